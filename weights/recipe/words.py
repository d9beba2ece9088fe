"""The words that the sentences are made of: common English, all of it spelt the way that it is said in full."""

NAMES = """
Alice Anna Ben Bob Carol Charles Clara Daniel David Diana Edward Ella Emily Emma Eric Frank George Grace Hannah Harry
Helen Henry Ian Jack James Jane John Julia Kate Kevin Laura Leo Linda Lucy Mark Martin Mary Max Michael Nancy Nick
Nora Oliver Oscar Paul Peter Rachel Robert Rose Ruth Sam Sarah Simon Sophie Susan Thomas Tim Tom Victor William
""".split()

PLACES = """
Paris London Boston Chicago Berlin Rome Madrid Vienna Dublin Tokyo Sydney Toronto Denver Dallas Texas Florida Canada
Mexico Brazil Egypt India China Japan Spain Italy France Germany Norway Sweden Poland Greece Africa Europe America
""".split()

PEOPLE = """
actor aunt baker barber boy brother captain chef child clerk coach cousin dancer daughter dentist doctor driver
engineer father farmer fireman friend gardener girl grandmother guard guest hunter judge king lady lawyer leader
librarian man manager mayor mother musician neighbor nurse officer painter pilot player poet prince queen sailor
scientist sister soldier son stranger student tailor teacher uncle visitor waiter woman worker writer
""".split()

ANIMALS = """
bear bee bird bull cat chicken cow deer dog donkey duck eagle elephant fish fox frog goat goose hen horse lion monkey
mouse owl parrot pig pigeon pony rabbit rat seal sheep snake spider squirrel swan tiger turkey turtle whale wolf
""".split()

THINGS = """
apple bag ball bank basket bed bell bench bicycle blanket boat book bottle bowl box bread bridge broom brush bucket
button cake camera candle car card carpet chain chair cheese chest clock cloud coat coffee coin computer cookie cup
curtain desk diamond dinner dish door drawer dress drum egg engine envelope fence film flag flower fork fountain
garden gate gift glass glove guitar hammer hat helmet house jacket jar juice kettle key kitchen knife ladder lamp
lemon letter lock machine magazine map medal melon menu message mirror necklace needle newspaper note novel orange
oven paper parcel pear pen pencil phone photograph piano picture pillow pipe plan plate pocket poem present puzzle
radio ring rope sandwich saw scarf shirt shoe shovel sofa song soup spoon stamp stone story suitcase sweater table
telephone tent ticket towel toy train tree trumpet umbrella vase violin wagon wall wallet watch wheel whistle window
""".split()

STUFF = """
bread butter coffee cheese cotton flour fruit gold honey ice ink iron juice leather milk money music oil paint paper
rice salt sand silk silver snow soap soup sugar tea water wine wood wool
""".split()

SPOTS = """
airport attic backyard bakery basement beach bedroom castle cave church city corner desert factory farm field forest
garage garden harbor hill hospital hotel island kitchen lake library market meadow mountain museum office palace park
playground pond prison restaurant river road roof room school shop square stable stadium station store street theater
tower town valley village
""".split()

ADJECTIVES = """
ancient angry beautiful big black blue brave bright broken brown busy calm careful cheap clean clever cold cool curious
dark deep dirty dry empty expensive famous fast fine fresh friendly funny gentle golden good gray great green happy
hard heavy honest hot huge hungry important kind large lazy light little lonely long lost loud lovely lucky modern
narrow new nice noisy old orange plain polite poor pretty proud purple quick quiet rare red rich rough round sad safe
serious sharp short shy silent silver simple slow small smart smooth soft special square strange strong sweet tall
thick thin tiny tired warm weak wet white wide wild wise wonderful wooden yellow young
""".split()

FEELINGS = """
afraid angry asleep awake busy calm careful certain cheerful cold curious early famous free glad happy hungry kind
late lonely lucky nervous patient pleased polite proud quiet ready rich sad safe sick silent sorry strong sure
surprised thirsty tired upset wise worried wrong young
""".split()

# Doing something to a thing: base, past.
ACTIONS = """
admire:admired borrow:borrowed break:broke bring:brought build:built burn:burned buy:bought carry:carried catch:caught
check:checked choose:chose clean:cleaned close:closed collect:collected cover:covered describe:described draw:drew
drop:dropped empty:emptied examine:examined fetch:fetched fill:filled find:found finish:finished fix:fixed
forget:forgot give:gave guard:guarded hide:hid hold:held ignore:ignored keep:kept lift:lifted lose:lost love:loved
make:made measure:measured mention:mentioned move:moved need:needed notice:noticed open:opened order:ordered
paint:painted pass:passed pick:picked prepare:prepared promise:promised pull:pulled push:pushed receive:received
remember:remembered repair:repaired replace:replaced return:returned save:saved sell:sold send:sent share:shared
show:showed steal:stole study:studied take:took throw:threw touch:touched use:used want:wanted wash:washed watch:watched
""".split()

# Moving or being somewhere: base, past.
MOVES = """
arrive:arrived climb:climbed dance:danced fall:fell fly:flew hide:hid hurry:hurried jump:jumped laugh:laughed
listen:listened live:lived march:marched play:played rest:rested ride:rode run:ran shout:shouted sing:sang sit:sat
sleep:slept smile:smiled stand:stood stay:stayed stop:stopped swim:swam talk:talked travel:traveled wait:waited
wake:woke walk:walked wander:wandered whisper:whispered work:worked
""".split()

ADVERBS = """
again alone already always badly bravely carefully certainly clearly early easily finally gently gladly happily
honestly kindly late loudly never nearly often once perfectly politely probably proudly quickly quietly rarely
really sadly safely silently simply slowly softly sometimes soon still suddenly together twice usually well
""".split()

TIMES = (
    """
this morning|this afternoon|this evening|tonight|today|tomorrow|yesterday|last night|last week|last summer|last winter
next week|next month|next year|every day|every night|every morning|after lunch|after dinner|before breakfast
before sunrise|at noon|at midnight|in the morning|in the evening|in the spring|in the autumn|all day|all night
for a long time|a long time ago|many years ago|right now|on Monday|on Tuesday|on Wednesday|on Thursday|on Friday
on Saturday|on Sunday|in January|in February|in March|in April|in May|in June|in July|in August|in September
in October|in November|in December
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

WEATHER = "cloudy cold cool dark dry foggy hot icy mild rainy snowy stormy sunny warm wet windy".split()

SUBJECTS = """
art business chemistry cooking dancing drawing English fishing football French gardening geography German history
literature math medicine music painting physics poetry politics reading science singing Spanish sports tennis writing
""".split()

PREPOSITIONS = "above|across from|behind|below|beside|close to|far from|in front of|inside|near|next to|outside".split(
    "|"
)

# Whole sayings, for the sound of everyday speech.
PHRASES = (
    """
Hello there.|Good morning, everyone.|Good evening and welcome.|How are you today?|I am fine, thank you.|See you soon.
Thank you very much.|You are welcome.|Please come in.|Have a nice day.|What time is it?|Where are you from?|Excuse me.
I am sorry to hear that.|That sounds good to me.|What do you think?|I have no idea.|Let me think about it.|Of course.
Can you help me, please?|It was nice to meet you.|Do not worry about it.|Take your time.|Are you ready?|Be careful.
I could not agree more.|Who is there?|Why not?|That is a good question.|Wait a minute.|Never mind.|Good night.
Congratulations.|Happy birthday to you.|Welcome home.|Sit down, please.|I will be right back.|Nothing has changed.
This is a test.|Let us begin.|Everything is all right.|I beg your pardon?|It does not matter.|You can count on me.
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
