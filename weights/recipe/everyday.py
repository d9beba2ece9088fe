"""Templates for what dictionaries' example sentences lack: questions, times, dates, prices, names, greetings, lists."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from csm.weights.recipe.sentences import number_in_words, year_in_words

NAMES = """
Aaron Adam Alan Albert Alex Alice Amanda Amy Andrea Andrew Angela Anna Anthony Arthur Barbara Ben Beth Bill Bob Brandon
Brenda Brian Bruce Carl Carlos Caroline Catherine Charlotte Chloe Chris Christina Claire Clara Daisy Dan Daniel Dave
David Dean Deborah Dennis Diana Diego Donald Donna Dorothy Doug Dylan Edward Elaine Eleanor Elizabeth Ella Ellen Emily
Emma Eric Ethan Eva Evelyn Fiona Frank Fred Gary George Gloria Grace Greg Hannah Harold Harry Heather Helen Henry Holly
Hugo Ian Isaac Isabel Jack Jacob James Jane Janet Jason Jean Jeff Jennifer Jeremy Jerry Jessica Jim Joan Joe John
Jonathan Jordan Joseph Joshua Judy Julia Julie Justin Karen Kate Keith Kelly Ken Kevin Kim Kyle Larry Laura Lauren Leo
Leon Lewis Liam Linda Lisa Logan Lucas Lucy Luke Maggie Marcus Margaret Maria Mark Martha Martin Mary Matt Matthew Max
Megan Melissa Mia Michael Michelle Mike Molly Monica Nancy Natalie Nathan Neil Nick Nicole Noah Nora Oliver Olivia
Oscar Owen Pam Patricia Patrick Paul Paula Peter Phil Philip Rachel Ralph Raymond Rebecca Richard Rick Rob Robert Robin
Roger Ron Rose Rosie Roy Ruth Ryan Sally Sam Samantha Samuel Sandra Sara Sarah Scott Sean Sharon Simon Sophia Stella
Stephen Steve Sue Susan Ted Teresa Thomas Tim Tina Todd Tom Tony Tyler Vera Victoria Vincent Walter Wayne Wendy William
Zoe
""".split()
SURNAMES = """
Adams Allen Anderson Baker Bell Bennett Brooks Brown Campbell Carter Clark Collins Cooper Cox Davis Diaz Edwards Evans
Fisher Foster Garcia Gray Green Hall Harris Hill Howard Hughes Jackson Johnson Jones Kelly King Lee Lewis Lopez Martinez
Miller Mitchell Moore Morgan Morris Murphy Nelson Parker Patel Perez Phillips Powell Price Reed Rivera Roberts Robinson
Rogers Ross Russell Sanders Scott Smith Stewart Sullivan Taylor Thomas Thompson Turner Walker Ward Watson White Williams
Wilson Wood Wright Young
""".split()
PLACES = """
Alaska Amsterdam Arizona Athens Atlanta Austin Australia Austria Baltimore Barcelona Beijing Belgium Berlin Boston
Brazil Brooklyn Cairo California Canada Chicago Chile China Cleveland Colorado Cuba Dallas Denmark Denver Detroit
Dublin Egypt England Finland Florida France Geneva Germany Greece Hawaii Houston Hungary Iceland India Ireland Israel
Italy Jamaica Japan Kansas Kentucky Kenya London Madrid Manchester Melbourne Memphis Mexico Miami Michigan Milan
Montana Montreal Moscow Munich Nashville Nevada Norway Ohio Oregon Orlando Oslo Paris Peru Philadelphia Phoenix Poland
Portland Portugal Prague Rome Russia Scotland Seattle Singapore Spain Stockholm Sweden Switzerland Sydney Tennessee
Texas Thailand Tokyo Toronto Turkey Utah Venice Vermont Vienna Vietnam Virginia Wales Warsaw Washington
""".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ORDINALS = """
first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth
sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth twenty-fifth
twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth thirty-first
""".split()
LETTERS = "B C D E F G H J K L M N O P Q R S T U V W X Y Z".split()
THINGS = (
    """
keys|phone|wallet|charger|laptop|password|homework|glasses|bag|backpack|bike|car|coat|shoes|socks|gloves|hat|headphones
tickets|passport|luggage|receipt|medicine|toothbrush|towel|blanket|lunch|coffee|sandwich|groceries|package|mail|email
message|report|presentation|schedule|calendar|budget|project|contract|recipe|guitar|camera|notebook|dishes|laundry|trash
dog|cat|plants|garden|kitchen|bathroom|bedroom|window|door|garage|fridge|oven|dishwasher|washing machine|lights|heater
speaker|remote control|remote|television|computer|printer|screen|battery|alarm|umbrella|appointment|reservation|order
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
FOODS = (
    """
apples|bananas|grapes|strawberries|blueberries|lemons|carrots|onions|garlic|tomatoes|lettuce|spinach|broccoli|beans
potatoes|rice|pasta|noodles|bread|toast|butter|cheese|yogurt|milk|cream|eggs|bacon|ham|chicken|beef|pork|fish|salmon
shrimp|soup|salad|pizza|burgers|fries|tacos|curry|cereal|oatmeal|pancakes|waffles|cookies|cake|pie|chocolate|ice cream
honey|sugar|salt|pepper|flour|olive oil|vinegar|ketchup|mustard|tea|coffee|juice|lemonade|water|wine|beer
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
PEOPLE = (
    """
my mother|my father|my sister|my brother|my boss|my neighbor|my roommate|my wife|my husband|my son|my daughter|my aunt
my uncle|my cousin|my grandmother|my grandfather|the teacher|the doctor|the nurse|the plumber|the mechanic|the landlord
the manager|the waiter|the driver|the coach|the kids|the children|our friends|everyone|somebody|her parents|his family
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
WHERE = (
    """
at home|at work|at school|at the office|at the gym|at the airport|at the station|at the store|at the mall|at the park
at the library|at the hospital|at the bank|at the post office|at the beach|at the restaurant|at the hotel|downtown
upstairs|downstairs|outside|in the kitchen|in the garage|in the car|in the back yard|on the couch|on the table
on the counter|on the shelf|in the drawer|in the fridge|under the bed|next to the door|across the street|down the road
around the corner|over there|near the lake|in the mountains|by the window|at the dentist|in the parking lot
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
WHEN = (
    """
today|tonight|tomorrow|yesterday|this morning|this afternoon|this evening|this weekend|last night|last week|last month
next week|next month|next year|later|soon|right now|in a minute|in an hour|before dinner|after lunch|after work
before school|on the weekend|at noon|at midnight|every day|every week|all day|once in a while|as soon as possible
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
DO = (
    """
call|visit|help|ask|meet|remind|thank|invite|text|surprise|pick up|drop off|wait for|talk to|listen to|write to
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
HANDLE = (
    """
find|clean|fix|check|move|bring|buy|send|finish|open|close|cancel|change|update|print|carry|wash|water|feed|turn on
turn off|pick up|put away|look for|take care of|forget|lose|need|want|get|keep|sell|show me|pay for|replace|charge
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
ACTIVITIES = (
    """
swimming|running|hiking|shopping|fishing|camping|dancing|cooking|reading|painting|skiing|sailing|gardening|traveling
singing|knitting|drawing|biking|climbing|jogging|bowling|studying|working|sleeping|exercising|baking|writing|driving
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
FEELINGS = (
    """
tired|hungry|thirsty|happy|sad|excited|nervous|bored|busy|late|early|ready|sick|sorry|worried|surprised|confused|proud
angry|lost|lucky|fine|okay|scared|grateful|exhausted|disappointed|comfortable|curious|jealous|lonely|relaxed|stressed
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
QUALITIES = (
    """
good|bad|great|terrible|amazing|awful|easy|hard|difficult|fun|boring|interesting|funny|strange|weird|nice|beautiful|ugly
expensive|cheap|free|delicious|spicy|fresh|cold|hot|warm|loud|quiet|bright|dark|heavy|light|fast|slow|long|short|huge
tiny|broken|dirty|clean|empty|full|safe|dangerous|important|perfect|possible|impossible|closed|open|crowded|different
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
WEATHER = "rain|snow|be sunny|be cloudy|be windy|be foggy|be freezing|be humid|get cold|get warm|clear up|storm".split(
    "|"
)
TEMPLATES = (
    """
Hi {name}.|Hello {name}, how are you?|Hey {name}, it's {name}.|Good morning, {name}!|Good night, {name}.|Bye, {name}!
Hi there, my name is {name} {surname}.|This is {name} {surname} speaking.|Nice to meet you, {name}.
Welcome to {place}!|I'm {name}, and this is {name}.|Thanks for your help, {name}.|Is {name} there?
Have you met {name} {surname}?|Mister {surname} will see you {when}.|Doctor {surname} is {where}.
Miss {surname} called {when}.|What time is it in {place}?|It's {clock}.|It's almost {clock}.|Let's meet at {clock}.
The meeting starts at {clock}.|Set an alarm for {clock}.|Wake me up at {clock}.|We close at {clock}.
My flight leaves at {clock} on {day}.|The bus comes every {number} minutes.|Set a timer for {number} minutes.
I'll be there in {number} minutes.|Remind me to {handle} the {thing} {when}.|Remind me to {do} {name} at {clock}.
Can you {handle} the {thing}?|Could you please {handle} the {thing} {when}?|Would you mind if I {handle} the {thing}?
Did you {handle} the {thing}?|Don't forget to {handle} the {thing}.|Please {handle} my {thing}.
I need to {handle} the {thing} {when}.|I can't {handle} the {thing} {when}.|Who's going to {handle} the {thing}?
Why didn't you {handle} the {thing}?|Where's the {thing}?|Where did you put my {thing}?|I left my {thing} {where}.
Your {thing} is {where}.|The {thing} is {quality}.|That {thing} isn't {quality}.|Isn't the {thing} {quality}?
This is a {quality} {thing}.|What a {quality} {thing}!|I think it's {quality}.|It was really {quality}.
That's {quality}!|It's not that {quality}.|How {quality} is it?|It wasn't as {quality} as I thought.
It's too {quality} for me.|She said it was {quality}.|I'm so {feeling}.|Are you {feeling}?|You look {feeling}.
Why are you {feeling}?|{person_cap} was {feeling} {when}.|{person_cap} is {where}.|Where is {person}?
{person_cap} went {activity} {when}.|Let's go {activity} {when}.|I love {activity}.|I don't like {activity}.
Do you like {activity}?|I'm tired of {activity}.|We're {activity} {where}.|{name} and {name} are {where}.
{name} lives in {place}.|I grew up in {place}.|We're moving to {place} in {month}.|How far is {place} from here?
What's the weather like in {place}?|Will it {weather} {when}?|It's going to {weather} {when}.
I think it might {weather} on {day}.|It's {number} degrees outside.|My birthday is on {month} {ordinal}.
Today is {day}, {month} {ordinal}.|He was born in {year}.|We got married in {year}.|The year was {year}.
See you on {day}.|I'm busy on {day}.|Are you free on {day}?|How about {day} at {clock}?|I'll see you {when}.
That costs {number} dollars.|It's {number} dollars and {number} cents.|I paid {number} dollars for the {thing}.
The total is {number} dollars.|Only {number} people came.|There are {number} of them.|Page {number}, please.
My phone number is {digits}.|The code is {digits}.|Room {number} is {where}.|Turn to chapter {small}.
I'm on line {small}.|She's {number} years old.|We need {small} more.|{small_cap}, {small}, {small}.
I waited for {small} hours.|We have {food}, {food}, and {food}.|I'd like {food} and {food}, please.
Buy {food}, {food}, {food}, and {food}.|Do we have any {food}?|We're out of {food}.|Can I have some {food}?
What's for dinner, {food} or {food}?|I'm allergic to {food}.|This {food} tastes {quality}.
Add {food} to my shopping list.|I had {food} for breakfast.|Would you like {food} with your {food}?
{name} made {food} {when}.|Who wants more {food}?|No {food} for me, thanks.|I need to {do} {person} {when}.
Can you {do} {name} for me?|Did you {do} {person} {when}?|I'll {do} you {when}.|{name} wants to {do} {person}.
Please {do} {name} {surname}.|We should {do} {person} {when}.|I've never been to {place}.|Have you been to {place}?
They've lived in {place} since {year}.|We flew from {place} to {place}.|Play something by {name} {surname}.
Turn left, then right.|Spell it {letter}, {letter}, {letter}.|It's flight {letter} {number}.|Yes, please.
No, thank you.|Of course.|Sure, why not?|Okay, sounds good.|I guess so.|I don't think so.|Not really.|Absolutely!
Sorry, I didn't catch that.|Could you repeat that?|What do you mean?|I have no clue.|It doesn't matter.|Never mind.
Well, {when}.|If it {rains}, we'll stay {where}.|When {person} comes home, we'll {handle} the {thing}.
I haven't {done} it yet.|{name} said {person} was {feeling}.|I wonder if {name} is {feeling}.
You should've told {person}.|They're not {quality}, are they?|Whose {thing} is this?|Which {thing} do you want?
How many {food} did you eat?|How long have you been {activity}?|What's wrong?
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


def _of(options: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(options)


def _number(rng: random.Random) -> str:
    return number_in_words(rng.choice((rng.randint(2, 20), rng.randint(21, 99), rng.randint(100, 999), 1000)))


def _clock(rng: random.Random) -> str:
    hour = number_in_words(rng.randint(1, 12))
    minute = rng.randint(10, 59)
    exact = (f"{hour} {number_in_words(minute)}", f"{hour} oh {number_in_words(minute % 9 + 1)}")
    said = (f"{hour} o'clock", f"half past {hour}", f"quarter to {hour}", f"quarter past {hour}", *exact, exact[0])
    return rng.choice(said) + rng.choice(("", "", " in the morning", " in the evening", " at night"))


def _digits(rng: random.Random) -> str:
    return " ".join(number_in_words(rng.randint(0, 9)) for _ in range(rng.randint(3, 7)))


SLOTS: dict[str, Callable[[random.Random], str]] = {
    "name": _of(NAMES),
    "surname": _of(SURNAMES),
    "place": _of(PLACES),
    "month": _of(MONTHS),
    "day": _of(DAYS),
    "ordinal": _of(ORDINALS),
    "letter": _of(LETTERS),
    "thing": _of(THINGS),
    "food": _of(FOODS),
    "person": _of(PEOPLE),
    "where": _of(WHERE),
    "when": _of(WHEN),
    "do": _of(DO),
    "handle": _of(HANDLE),
    "activity": _of(ACTIVITIES),
    "feeling": _of(FEELINGS),
    "quality": _of(QUALITIES),
    "weather": _of(WEATHER),
    "rains": _of(["rains", "snows", "gets cold", "gets late", "gets dark"]),
    "done": _of(["seen", "done", "read", "finished", "tried", "used", "bought", "heard", "told anyone about"]),
    "number": _number,
    "small": lambda rng: number_in_words(rng.randint(2, 12)),
    "clock": _clock,
    "digits": _digits,
    "year": lambda rng: year_in_words(rng.randint(1900, 2029)),
}


def everyday_sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of the templates without end."""
    while True:
        text = re.sub(r"{(\w+)}", lambda match: _fill(match[1], rng), rng.choice(TEMPLATES))
        text = re.sub(r"\b([Aa]) (?=[aeiou])(?!use|uni|one)", r"\1n ", text)
        yield text[0].upper() + text[1:]


def _fill(slot: str, rng: random.Random) -> str:
    text = SLOTS[slot.removesuffix("_cap")](rng)
    return text[0].upper() + text[1:] if slot.endswith("_cap") else text
