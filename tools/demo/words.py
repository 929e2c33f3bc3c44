"""The vocabulary of the demo grammar: plain word lists, and the few rules that inflect them."""

# ruff: noqa: SIM905 - word lists are easier to read and to extend as text

from __future__ import annotations

FEMALE = """
Maria Anna Natalia Emma Olivia Sofia Mia Lucy Clara Nora Alice Julia Hannah Grace Chloe Zoe Ella
Eva Ruth Sara Laura Lena Nina Rosa Irene Diana Helen Marta Elena Paula Carla Amina Fatima Leila
Yuki Mei Priya Anita Indira Aisha Zara Ingrid Astrid Freya Greta Heidi Ines Lola Carmen Bella
Daisy Ivy Holly Amy Kate Jane Mary Betty Wendy Tina Rita Vera Olga Tanya Katya Bianca Gloria
Monica Naomi Miriam Esther Judith Maya Layla Sana Noor Hana Keiko Akiko Lin Suki Farah Salma
""".split()

MALE = """
Tom Ben Jack Omar Ali Sam Max Leo Paul Peter Mark Luke John James David Daniel Adam Noah Liam Oscar
Hugo Felix Victor Ivan Boris Dmitri Pablo Diego Carlos Juan Luis Marco Luca Paolo Pierre Louis Henri
Hans Karl Otto Fritz Erik Lars Sven Nils Kenji Hiro Taro Wei Chen Raj Arun Vikram Sanjay Ravi Ahmed
Hassan Karim Tariq Yusuf Ibrahim Samir Kofi Kwame Jabari Tunde George Henry Frank Fred Bill Bob Jim
Tim Joe Dan Ken Ron Ray Simon Martin Robert Edward Thomas Oliver Ethan Lucas
""".split()

NAMES = FEMALE + MALE

CITIES = """
Lyon Paris Rome Milan Madrid Lisbon Porto Berlin Hamburg Munich Vienna Prague Warsaw Oslo Bergen
Helsinki Dublin London Leeds Bristol Oxford York Glasgow Zurich Geneva Athens Cairo Tunis Nairobi
Lagos Accra Dakar Delhi Mumbai Tokyo Osaka Kyoto Seoul Beijing Hanoi Manila Jakarta Sydney Perth
Lima Quito Bogota Havana Boston Chicago Denver Dallas Austin Seattle Portland Miami Toronto Ottawa
Montreal Vancouver Brussels Ghent Bruges Cologne Naples Turin Venice Florence Seville Valencia
Krakow Budapest Bucharest Belgrade Zagreb Riga Vilnius Tallinn Kyiv Ankara Istanbul Baghdad
""".split()

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Germany": "Berlin", "Austria": "Vienna", "Poland": "Warsaw", "Norway": "Oslo",
    "Finland": "Helsinki", "Ireland": "Dublin", "England": "London", "Greece": "Athens",
    "Egypt": "Cairo", "Tunisia": "Tunis", "Kenya": "Nairobi", "Ghana": "Accra",
    "Senegal": "Dakar", "India": "Delhi", "Japan": "Tokyo", "Korea": "Seoul", "China": "Beijing",
    "Vietnam": "Hanoi", "Peru": "Lima", "Ecuador": "Quito", "Colombia": "Bogota",
    "Cuba": "Havana", "Canada": "Ottawa", "Belgium": "Brussels", "Hungary": "Budapest",
    "Latvia": "Riga", "Turkey": "Ankara", "Iraq": "Baghdad", "Sweden": "Stockholm",
    "Denmark": "Copenhagen",
}  # fmt: skip

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """
January February March April May June July August September October November December
""".split()

# Things that people buy, sell, collect, count and give away: one word, countable, plural.
ITEMS = """
apples pears oranges lemons bananas plums peaches cherries mangoes melons grapes tomatoes potatoes
carrots onions cabbages peppers beans eggs loaves cakes cookies muffins pies sandwiches pizzas
candies sweets chocolates pencils pens crayons markers erasers notebooks books comics magazines
papers cards stamps stickers postcards letters envelopes photos posters paintings maps coins marbles
shells stones rocks pebbles beads buttons ribbons clips pins nails screws bolts bricks tiles boards
boxes bags baskets bottles jars cups mugs plates bowls spoons forks knives pots pans lamps candles
clocks watches rings keys locks ropes chairs tables desks shelves pillows blankets towels rugs
curtains shirts jackets coats scarves hats caps gloves socks shoes boots sandals umbrellas toys dolls
puzzles kites balls balloons drums flutes guitars bells flowers roses tulips lilies daisies seeds
plants trees bushes ducks chickens hens rabbits hamsters kittens puppies goldfish tickets badges
medals trophies flags batteries cables phones cameras radios magnets robots bicycles helmets tents
""".split()

ANIMALS = """
cat dog horse cow sheep goat pig duck hen goose rabbit mouse rat fox wolf bear lion tiger elephant
monkey giraffe zebra camel deer moose squirrel hedgehog badger otter beaver seal whale dolphin shark
owl eagle hawk crow robin sparrow swan parrot penguin pigeon frog toad snake lizard turtle crab
spider ant bee butterfly beetle snail worm
""".split()

PLACES = """
park garden forest river lake beach market shop school library museum station farm kitchen house
castle village town city bridge hill mountain field road street square church tower harbour island
valley meadow pond cave barn mill bakery cafe hospital theatre cinema office factory airport hotel
playground zoo bank cottage attic cellar yard path
""".split()

JOBS = """
teacher doctor nurse baker farmer driver pilot sailor singer dancer painter writer lawyer judge cook
waiter tailor builder plumber barber dentist gardener fisher soldier scientist engineer student
librarian carpenter mechanic miner actor poet clerk guard butcher grocer florist chemist architect
designer reporter editor musician translator
""".split()

THINGS = """
door window lamp table chair book letter map key box bag cup plate bell clock mirror picture ladder
rope boat ship car train bus wagon bicycle kite ball drum flute hat coat shirt shoe scarf ring coin
basket bottle blanket pillow bed candle stone shell feather leaf flower tree apple cake loaf cheese
soup pie egg fish sword shield crown flag tent barrel chest lantern compass umbrella hammer bucket
brush broom shovel wheel
""".split()

ADJECTIVES = """
big small old young new little tall short long wide narrow heavy light warm cold hot cool dry wet
clean dirty bright dark quiet loud soft hard smooth rough sweet sour fresh strong weak fast slow
early late rich poor kind brave clever wise funny happy sad angry tired hungry thirsty busy lazy shy
proud calm gentle honest lucky lonely friendly curious careful pretty lovely beautiful ugly strange
simple plain round square flat deep shallow empty full open broken golden silver wooden red blue
green yellow white black brown grey pink purple orange
""".split()

FEELINGS = """
happy sad angry tired hungry thirsty proud calm lonely lucky curious brave afraid sleepy excited
bored worried surprised glad sorry sick ready
""".split()

COLOURS = "red blue green yellow white black brown grey pink purple orange golden silver".split()

WEATHER = (
    "sunny rainy cloudy windy snowy foggy stormy warm cold hot cool dry wet dark bright".split()
)

ADVERBS = """
slowly quickly quietly loudly softly gently carefully happily sadly proudly bravely kindly calmly
suddenly soon again together alone often always never sometimes today tomorrow yesterday
""".split()

FOODS = """
bread cheese soup rice pasta fish cake pie salad honey butter jam milk tea coffee juice water
chocolate fruit porridge stew toast corn
""".split()

MATERIALS = "wood stone glass paper gold silver iron wool cotton leather clay brick".split()

HOBBIES = """
reading writing painting singing dancing cooking swimming running fishing sailing hiking camping
cycling skating skiing gardening knitting sewing drawing chess football tennis music
""".split()

# Words that stand in quotation marks now and then.
LABELS = """
name item count place day age job city event time year month hobby colour animal person number title
price size kind meeting party lesson concert trip lunch dinner game match
""".split()

OPPOSITES = {
    "big": "small", "old": "young", "tall": "short", "long": "short", "wide": "narrow",
    "heavy": "light", "warm": "cool", "hot": "cold", "dry": "wet", "clean": "dirty",
    "bright": "dark", "quiet": "loud", "soft": "hard", "smooth": "rough", "sweet": "sour",
    "strong": "weak", "fast": "slow", "early": "late", "rich": "poor", "happy": "sad",
    "brave": "afraid", "deep": "shallow", "empty": "full", "open": "closed", "new": "old",
    "up": "down", "left": "right", "day": "night", "good": "bad", "first": "last",
    "near": "far", "high": "low", "true": "false", "begin": "end",
}  # fmt: skip

SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "sheep": "baa", "duck": "quack", "owl": "hoot",
    "horse": "neigh", "pig": "oink", "lion": "roar", "bee": "buzz", "crow": "caw",
    "snake": "hiss", "mouse": "squeak", "frog": "croak",
}  # fmt: skip

LEGS = {
    "cat": 4, "dog": 4, "horse": 4, "cow": 4, "sheep": 4, "goat": 4, "pig": 4, "duck": 2,
    "hen": 2, "spider": 8, "ant": 6, "bee": 6, "fox": 4, "wolf": 4, "bear": 4, "owl": 2,
    "snake": 0, "fish": 0, "beetle": 6, "swan": 2, "rabbit": 4, "deer": 4, "eagle": 2,
}  # fmt: skip

# Base form, past, past participle and -ing form: verbs that take a thing.
TRANSITIVE = [
    tuple(row.split())
    for row in """
find found found finding
see saw seen seeing
buy bought bought buying
sell sold sold selling
bring brought brought bringing
take took taken taking
make made made making
draw drew drawn drawing
paint painted painted painting
clean cleaned cleaned cleaning
carry carried carried carrying
open opened opened opening
close closed closed closing
hide hid hidden hiding
lose lost lost losing
keep kept kept keeping
break broke broken breaking
fix fixed fixed fixing
wash washed washed washing
move moved moved moving
choose chose chosen choosing
pick picked picked picking
build built built building
borrow borrowed borrowed borrowing
steal stole stolen stealing
drop dropped dropped dropping
throw threw thrown throwing
catch caught caught catching
hold held held holding
push pushed pushed pushing
pull pulled pulled pulling
touch touched touched touching
watch watched watched watching
want wanted wanted wanting
need needed needed needing
like liked liked liking
love loved loved loving
remember remembered remembered remembering
forget forgot forgotten forgetting
show showed shown showing
""".strip().splitlines()
]

# Verbs of moving: something that one does to or at a place.
MOTION = [
    tuple(row.split())
    for row in """
walk walked walked walking
run ran run running
go went gone going
drive drove driven driving
ride rode ridden riding
sail sailed sailed sailing
travel travelled travelled travelling
hurry hurried hurried hurrying
climb climbed climbed climbing
return returned returned returning
come came come coming
fly flew flown flying
""".strip().splitlines()
]

# Verbs that stand alone.
INTRANSITIVE = [
    tuple(row.split())
    for row in """
sleep slept slept sleeping
sing sang sung singing
dance danced danced dancing
laugh laughed laughed laughing
cry cried cried crying
smile smiled smiled smiling
wait waited waited waiting
work worked worked working
play played played playing
rest rested rested resting
read read read reading
swim swam swum swimming
talk talked talked talking
think thought thought thinking
dream dreamed dreamed dreaming
listen listened listened listening
shout shouted shouted shouting
study studied studied studying
cook cooked cooked cooking
fish fished fished fishing
""".strip().splitlines()
]

ONES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n: int) -> str:
    """The English words of 0 <= n <= 199."""
    if n >= 100:
        rest = "" if n == 100 else f" and {number_words(n - 100)}"
        return f"one hundred{rest}"
    if n < 20:
        return ONES[n]
    tens, ones = divmod(n, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def third_person(base: str) -> str:
    """The form of a verb after he or she: "carry" -> "carries"."""
    if base.endswith(("s", "sh", "ch", "x", "o")):
        return base + "es"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + "s"


def plural(noun: str) -> str:
    """The regular plural of a noun, and the few irregular ones of our lists."""
    irregular = {
        "mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "fish": "fish",
        "wolf": "wolves", "leaf": "leaves", "loaf": "loaves", "moose": "moose",
    }  # fmt: skip
    return irregular.get(noun, third_person(noun))
