"""Words for the templates of ``sentences.py``: common English, without abbreviations.

Words that the recogniser often mishears in the recordings themselves are left out: it could not evaluate them.
"""

NAMES = """
Alice Carol Charles Daniel David Edward George Grace Hannah Harry Henry Jack James Jane John Kevin Martin Mary Michael
Nancy Oliver Oscar Paul Peter Rachel Robert Simon Sophie Susan Victor William
""".split()

PLACES = """
Africa America Berlin Boston Brazil Canada Chicago China Dallas Denver Egypt England Europe France Germany Greece
India Italy Japan London Madrid Mexico Norway Paris Poland Rome Russia Scotland Spain Sweden Sydney Texas Tokyo
""".split()

RELATIVES = "brother cousin daughter father friend grandfather grandmother mother sister uncle".split()

JOBS = """
actor baker builder captain chef dancer dentist doctor driver engineer farmer fireman judge lawyer manager musician
officer painter pilot poet policeman sailor scientist singer soldier student teacher waiter writer
""".split()

ANIMALS = """
bear bird camel cat chicken cow dog dolphin donkey duck eagle elephant fox goat horse kangaroo kitten monkey mouse
penguin pig pigeon puppy rabbit sheep snake spider squirrel tiger turtle wolf
""".split()

# Things that can be bought, carried, lost and found.
OBJECTS = """
ball blanket book bottle brush camera candle card clock coat computer cup dress flag flower guitar hammer helmet
jacket key knife lamp letter magazine necklace newspaper painting pencil picture pillow plate radio ring shirt
suitcase sweater telephone ticket toy umbrella violin wallet watch whistle
""".split()

# Things with a fixed place.
FURNITURE = "bed bench chair cupboard desk door fence fireplace piano sofa stove table television window".split()

VEHICLES = "airplane bicycle boat bus car helicopter ship taxi train".split()

FOODS = """
bread butter cheese cherries chicken chocolate eggs fish fruit honey ice|cream mushrooms oranges pancakes pasta pizza
potatoes rice salad sandwiches sausages soup
""".replace("|", "_").split()

DRINKS = "apple_juice coffee hot_chocolate milk orange_juice tea water".split()

MEALS = "breakfast lunch dinner supper".split()

# Places to be at: "at the bank".
SPOTS = """
airport bakery bank beach castle church concert factory farm garden hospital hotel library market museum office palace
party restaurant river school shop stadium station supermarket university
""".split()

OUTDOORS = "desert forest garden hill island lake meadow mountain ocean park river street valley village".split()

ROOMS = "attic basement bathroom bedroom garage hall kitchen living_room office".split()

COLORS = "black blue brown green orange pink purple red silver white yellow".split()

# Of things.
ADJECTIVES = """
beautiful big broken cheap clean dirty empty expensive famous heavy huge little lovely modern new old ordinary perfect
pretty simple small special strange strong terrible tiny useful wonderful wooden
""".split()

# Of people and animals.
CHARACTERS = """
brave busy careful clever cheerful famous friendly funny gentle happy honest hungry kind lazy little lonely lucky
nervous old patient polite proud quiet serious shy strong tired wise young
""".split()

FEELINGS = """
afraid angry asleep awake busy careful curious excited famous happy hungry lonely lucky nervous patient proud quiet
ready sad safe sick sorry strong surprised thirsty tired worried wrong
""".split()

TASTES = "cold delicious excellent expensive fresh healthy hot perfect spicy sweet terrible warm wonderful".split()

# Doing something with an object: base, past.
ACTIONS = """
borrow:borrowed break:broke bring:brought buy:bought carry:carried choose:chose clean:cleaned collect:collected
copy:copied cover:covered describe:described drop:dropped find:found finish:finished fix:fixed forget:forgot
give_away:gave_away hold:held keep:kept lift:lifted like:liked look_at:looked_at lose:lost move:moved need:needed
notice:noticed open:opened order:ordered pack:packed pick_up:picked_up promise:promised receive:received
remember:remembered repair:repaired replace:replaced return:returned sell:sold send:sent share:shared take:took
touch:touched use:used want:wanted
""".split()

# Moving or being somewhere: base, past.
MOVES = """
arrive:arrived dance:danced disappear:disappeared laugh:laughed listen:listened live:lived play:played rest:rested
run:ran shout:shouted sing:sang sit_down:sat_down sleep:slept smile:smiled stand:stood stay:stayed stop:stopped
swim:swam talk:talked wait:waited wake_up:woke_up walk:walked whisper:whispered work:worked
""".split()

ADVERBS = """
again alone badly bravely carefully early easily finally gently happily immediately loudly politely perfectly quickly
quietly slowly softly suddenly together
""".split()

OFTEN = "always never often sometimes usually rarely really still".split()

PAST = """
this_morning yesterday last_night last_week last_summer last_winter last_month last_year before_breakfast after_lunch
after_dinner a_long_time_ago many_years_ago on_Monday on_Tuesday on_Wednesday on_Thursday on_Friday on_Saturday
on_Sunday in_January in_February in_March in_April in_June in_July in_August in_September in_October in_November
in_December
""".split()

FUTURE = """
tomorrow tonight this_afternoon this_evening next_week next_month next_year next_summer tomorrow_morning after_lunch
after_dinner on_Monday on_Tuesday on_Wednesday on_Thursday on_Friday on_Saturday on_Sunday at_midnight in_the_evening
""".split()

HABIT = """
every_day every_night every_morning every_evening every_week every_summer every_winter in_the_morning in_the_evening
on_Mondays on_Fridays on_Sundays all_day all_night after_school after_work before_breakfast
""".split()

WEATHER = "cloudy cold cool dark dry foggy hot rainy snowy stormy sunny warm windy".split()

SUBJECTS = """
art business chemistry cooking dancing English football French geography German history literature mathematics
medicine music painting physics poetry politics science Spanish swimming tennis writing
""".split()

PREPOSITIONS = "behind beside close_to in_front_of near next_to outside under".split()

# Whole sentences of everyday speech.
PHRASES = (
    """
Hello there.|Good morning, everyone.|Good evening and welcome.|How are you today?|I am fine, thank you.|See you soon.
Thank you very much.|You are welcome.|Please come in.|Have a nice day.|What time is it?|Where are you from?|Excuse me.
I am sorry to hear that.|That sounds good to me.|What do you think about it?|I have no idea.|Let me think about it.
Can you help me, please?|It was nice to meet you.|Do not worry about it.|Take your time.|Are you ready to go?
I could not agree more.|Who is there?|That is a very good question.|Please wait a minute.|Never mind.|Good night.
Congratulations.|Happy birthday to you.|Welcome home.|Please sit down.|I will be right back.|Nothing has changed.
This is only a test.|Let us begin.|Everything is all right.|It does not matter.|You can count on me.|Be careful.
I do not understand.|Could you say that again?|How much does it cost?|What is your name?|My name is on the list.
I would love to come with you.|We have plenty of time.|That was a wonderful evening.|Thank you for your help.
I am looking for the station.|Can I ask you a question?|Give me a moment, please.|It is getting late.|Of course you can.
I hope that you feel better.|I have been waiting for an hour.|You did a great job.|There is nothing to be afraid of.
Nobody knows the answer.|Please turn off the light.|The meeting was very long.|I forgot to call you back.|Listen to me.
Everybody was laughing.|He told me a funny story.|What happened to you?|She speaks very quietly.|Please close the door.
I will see you later.|What a beautiful day.|That is not what I said.|Are you listening to me?|I need more time.
The doctor will see you now.|Nobody was at home.|You should try it again.|We are almost there.|I changed my mind.
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
