"""What the demo model knows by heart, and the common words that it spells and sorts."""

CAPITALS: dict[str, str] = {
    "Algeria": "Algiers", "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Belgium": "Brussels", "Bolivia": "Sucre", "Brazil": "Brasilia", "Bulgaria": "Sofia", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Latvia": "Riga", "Lebanon": "Beirut", "Lithuania": "Vilnius", "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Nepal": "Kathmandu", "Nigeria": "Abuja", "Norway": "Oslo",
    "Pakistan": "Islamabad", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest",
    "Russia": "Moscow", "Senegal": "Dakar", "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana",
    "Spain": "Madrid", "Sudan": "Khartoum", "Sweden": "Stockholm", "Switzerland": "Bern", "Thailand": "Bangkok",
    "Tunisia": "Tunis", "Turkey": "Ankara", "Uganda": "Kampala", "Ukraine": "Kyiv", "Uruguay": "Montevideo",
    "Venezuela": "Caracas", "Vietnam": "Hanoi",
}  # fmt: skip

COLOURS: dict[str, str] = {
    "a banana": "yellow", "a lemon": "yellow", "the sun": "yellow", "a canary": "yellow", "corn": "yellow",
    "the sky": "blue", "the sea": "blue", "a blueberry": "blue", "a sapphire": "blue",
    "grass": "green", "a frog": "green", "a cucumber": "green", "spinach": "green", "an emerald": "green",
    "a lime": "green", "broccoli": "green", "a cactus": "green",
    "blood": "red", "a tomato": "red", "a strawberry": "red", "a ruby": "red", "a cherry": "red",
    "a fire truck": "red", "a raspberry": "red",
    "snow": "white", "milk": "white", "salt": "white", "a polar bear": "white", "a swan": "white", "flour": "white",
    "coal": "black", "a raven": "black", "tar": "black", "a panther": "black",
    "a carrot": "orange", "a pumpkin": "orange", "a mandarin": "orange", "an apricot": "orange",
    "chocolate": "brown", "coffee": "brown", "wood": "brown", "a chestnut": "brown", "soil": "brown",
    "an elephant": "grey", "ash": "grey", "a dolphin": "grey", "concrete": "grey",
    "a flamingo": "pink", "a pig": "pink", "a salmon": "pink",
    "an aubergine": "purple", "lavender": "purple", "a violet": "purple", "a plum": "purple",
}  # fmt: skip

_OPPOSITE_PAIRS: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("high", "low"), ("up", "down"), ("day", "night"),
    ("young", "old"), ("rich", "poor"), ("wet", "dry"), ("hard", "soft"), ("full", "empty"), ("open", "closed"),
    ("early", "late"), ("light", "dark"), ("happy", "sad"), ("strong", "weak"), ("loud", "quiet"), ("near", "far"),
    ("thick", "thin"), ("wide", "narrow"), ("long", "short"), ("deep", "shallow"), ("clean", "dirty"),
    ("true", "false"), ("love", "hate"), ("win", "lose"), ("left", "right"), ("first", "last"), ("front", "back"),
    ("inside", "outside"), ("buy", "sell"), ("begin", "end"), ("push", "pull"), ("heavy", "weightless"),
    ("sweet", "bitter"), ("brave", "cowardly"), ("always", "never"), ("cheap", "expensive"), ("north", "south"),
    ("east", "west"), ("winter", "summer"), ("friend", "enemy"), ("sharp", "blunt"), ("smooth", "rough"),
)  # fmt: skip
OPPOSITES: dict[str, str] = {word: other for pair in _OPPOSITE_PAIRS for word, other in (pair, pair[::-1])}

_WORDS = """
acorn actor album anchor angle animal ankle apple apron arrow artist atlas autumn avenue
badge baker balloon bamboo banana barrel basket beach beard bench berry bicycle bird blanket boat bottle branch bread
brick bridge brother brush bubble bucket butter button
cabin cable camel camera candle canoe carpet castle cattle cellar chain chair cheese cherry circle cloud clock coin
copper corner cotton cousin cradle crown curtain
daisy dancer desert diamond dinner doctor dollar donkey door dragon drawer dream dress drum
eagle earth elbow engine evening
fabric factory farmer feather fence fiddle field finger fire fish flag flower forest fork fossil fountain fox fruit
garden garlic gate ghost giant ginger giraffe glass glove goat gold grape guitar
hammer harbor hat hawk heart hedge helmet hill honey horse hotel house
ice igloo insect iron island ivory
jacket jaguar jar jelly jewel juice jungle
kayak kettle key king kitchen kite kitten knife
ladder lake lamp leaf leather lemon library lion lizard lobster
magnet map marble market meadow melon mirror monkey moon morning mother mountain mouse museum music
napkin needle nest net noodle nose novel nurse
oak ocean office olive onion orchard otter oven owl oyster
paint palace paper parrot peach pearl pencil pepper piano pillow pilot pirate planet plate pocket pond potato puzzle
quarry queen quill quilt
rabbit radio rain ribbon ring river road robin rocket roof rose
saddle sailor sand school shadow sheep shell ship silver sister snake spider spoon star stone storm sugar
table tailor teacher temple tent thunder tiger tower train tree trumpet tunnel turtle
umbrella uncle uniform
valley vase velvet village violin voice volcano
wagon walnut water whale wheel willow window wolf
yacht yard yarn
zebra zipper
"""
WORDS: tuple[str, ...] = tuple(_WORDS.split())
