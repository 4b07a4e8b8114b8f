"""Words, names and small values the tasks draw from, each split into a trained and a held-out side."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from workstation.demo.tasks.base import Split, between, held_out, on_side, pick

WORDS = """
apple apricot banana berry cherry coconut date fig grape guava kiwi lemon lime mango melon nectarine olive orange papaya peach pear
plum quince raisin raspberry strawberry blueberry tomato almond bean cabbage carrot celery corn cucumber garlic ginger leek lentil
lettuce mushroom mustard nutmeg onion parsley pea pepper potato pumpkin radish rice spinach turnip wheat bread butter cheese chocolate
coffee cookie cream honey juice milk noodle pasta pizza salad salt sandwich soup sugar syrup tea vanilla vinegar water yogurt
ant badger bat bear beaver bee beetle bird bison camel cat cheetah chicken cobra cow coyote crab crane cricket crow deer dog dolphin
donkey dove dragon duck eagle eel elephant elk falcon ferret finch fish flamingo fox frog gazelle giraffe goat goose gorilla hamster
hare hawk hedgehog heron hippo horse hyena iguana jackal jaguar kangaroo koala lemur leopard lion lizard llama lobster lynx magpie
mole monkey moose mosquito mouse mule newt octopus otter owl ox panda panther parrot peacock pelican penguin pigeon pony puma rabbit
raccoon rat raven salmon seal shark sheep shrimp skunk sloth snail snake sparrow spider squid squirrel stork swan tiger toad trout
turkey turtle viper vulture walrus wasp weasel whale wolf wombat zebra
amber beige black blue brown copper coral crimson cyan gold gray green indigo ivory lilac magenta maroon navy pink purple red ruby
scarlet silver teal turquoise violet white yellow
actor artist author baker barber builder butcher captain carpenter chef clerk coach cook dancer dentist doctor driver editor engineer
farmer fisher gardener guard hunter judge lawyer manager mechanic miner musician nurse painter pilot plumber poet porter printer
sailor singer soldier surgeon tailor teacher trader waiter weaver writer
arrow axe bag ball band barrel basket bell belt bench blanket boat book boot bottle bowl box brick bridge broom brush bucket button
cable camera candle canvas card carpet cart chain chair chalk clock cloth coat coin compass cord cup curtain desk dish door drawer
drill drum engine fan fence flag flute fork frame glass globe glove guitar hammer handle hat helmet hook hose jacket jar kettle key
knife ladder lamp lantern lens lever lock magnet map mask mattress medal mirror motor nail needle net notebook oven paddle paper
pencil phone piano pillow pin pipe plate pliers pocket printing pump purse racket radio rail razor ribbon ring robot rocket rope
ruler saddle sail saw scarf scissors screen screw shelf shield shirt shoe shovel sink sled sock sofa spoon spring stamp stove string
sword table tape tent thread ticket toaster torch towel tower toy train tray trumpet truck tube umbrella vase violin wagon wallet
watch wheel whistle window wire wrench zipper
beach canyon castle cave city cliff cloud coast desert farm field forest garden glacier harbor hill house island jungle lake market
meadow mountain museum ocean office palace park pond prairie river road school shore sky station street temple theater valley village
volcano waterfall winter summer autumn morning evening night thunder lightning rain snow storm wind frost fog
angry bitter brave bright broad calm clean clever cold cool dark deep dry early empty fair fast fierce flat fresh full gentle giant
great happy hard heavy high hollow honest hot huge hungry kind large late lazy light little long loud lucky mild narrow neat new
noble old open plain polite poor proud quick quiet rapid rare rich rough round sad safe sharp short shy silent simple slow small
smart smooth soft solid sour steady steep strong sweet tall thick thin tiny tired warm weak wet wide wild wise young
answer balance battle beauty beginning border bottom branch breath center chance change circle corner country courage culture danger
detail dream earth effort energy example failure family feather festival fire flower force freedom friend future game gift group
history hope hunger idea journey joy knowledge language laughter law lesson letter level liberty machine magic memory message method
minute mistake moment money music mystery nation nature number object opinion order pattern peace person picture planet plant poem
power prize problem project promise puzzle question reason record reply result reward rhythm riddle rule science season secret shadow
shape signal silence sleep smile song sound space speed spirit star story student success surface surprise symbol system talent team
thought time travel treasure trouble truth union universe value victory voice weight wisdom wonder world year
""".split()

FIRST_NAMES = """
Ada Adam Agnes Aisha Alan Alba Albert Alice Amara Amir Ana Andre Anita Anna Anton Aria Arthur Astrid Ben Bella Boris Bruno Carla
Carlos Carmen Cecilia Chen Clara Claude Daniel Daria David Diana Diego Dmitri Dora Edgar Elena Elias Elif Ella Emil Emma Erik Esther
Eva Fatima Felix Fiona Flora Frank Frida George Gina Grace Greta Hana Hans Hassan Helen Henry Hugo Ida Igor Ines Ingrid Irene Iris
Isaac Ivan Jack Jacob Jane Jasmin Joan Johan Jonas Jorge Jose Julia Karim Karin Kate Kenji Klaus Lars Laura Lea Lena Leo Lily Linda
Louis Lucas Lucia Luna Magda Maja Marco Margot Maria Marina Mario Mark Marta Martin Maya Mei Mia Milan Mina Miriam Mona Nadia Naomi
Nelson Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paul Paula Pavel Pedro Peter Petra Pia Rafael Raj Ravi Rita Robert Rosa Ruth
Sam Samir Sara Selma Simon Sofia Stefan Stella Sven Tara Tariq Tess Theo Thomas Tim Tina Tom Uma Ursula Vera Victor Viktor Walter
Wanda Wei Yara Yuki Yusuf Zara Zoe
""".split()

CITIES = """
Accra Amsterdam Ankara Antwerp Athens Auckland Baku Bangkok Barcelona Basel Beijing Belgrade Bergen Berlin Bern Bilbao Bogota Bologna
Bonn Boston Bremen Brussels Budapest Cairo Calgary Cardiff Casablanca Chicago Cologne Copenhagen Cork Dakar Dallas Delhi Denver Dhaka
Dresden Dubai Dublin Durban Edinburgh Florence Geneva Genoa Ghent Glasgow Graz Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta
Kampala Karachi Kiev Kobe Krakow Kyoto Lagos Leeds Lima Lisbon Liverpool Ljubljana London Lyon Madrid Malaga Malmo Manila Marseille
Melbourne Miami Milan Minsk Montreal Moscow Mumbai Munich Nairobi Naples Nice Osaka Oslo Ottawa Oxford Palermo Paris Perth Porto
Prague Quito Reykjavik Riga Rome Rotterdam Salzburg Santiago Seattle Seoul Seville Shanghai Singapore Sofia Stockholm Sydney Tallinn
Tampere Tirana Tokyo Toronto Toulouse Trieste Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Vilnius Warsaw Yerevan Zagreb
Zurich
""".split()

_SYLLABLES = [c + v for c in "b c d f g h j k l m n p r s t v w z br dr kl st tr sh ch th gr pl".split() for v in "a e i o u".split()]
_ENDINGS = ["", "", "n", "r", "l", "s", "m", "ck", "nd", "th", "rt", "x", "y"]


def _sides(values: list[str], kind: str) -> dict[Split, list[str]]:
    return {
        "train": [value for value in values if not held_out(f"{kind}:{value}")],
        "held_out": [value for value in values if held_out(f"{kind}:{value}")],
    }


# Other text makes these words tokens of their own. A token whose letters were never shown cannot be spelled, so they are trained.
_COMMON = {"berry", "dry", "fast", "lock", "number", "office", "phone", "plain", "saw"}
_WORDS = _sides(WORDS, "word")
_WORDS["held_out"] = [value for value in _WORDS["held_out"] if value not in _COMMON]
_WORDS["train"] += sorted(_COMMON - set(_WORDS["train"]))
_NAMES = _sides(FIRST_NAMES, "name")
_CITIES = _sides(CITIES, "city")


def word(rng: Random, split: Split, invented: float = 0.15) -> str:
    """A lower-case word of the lexicon or, with probability `invented`, two halves of its words spliced together."""
    if rng.random() >= invented:
        return pick(rng, _WORDS[split])
    while True:
        front, back = pick(rng, _WORDS["train"]), pick(rng, _WORDS["train"])
        made = front[: between(rng, 2, len(front))] + back[between(rng, 1, len(back) - 1) :]
        if 3 <= len(made) <= 11 and on_side(f"word:{made}", split):
            return made


def invented_name(rng: Random, split: Split) -> str:
    while True:
        made = "".join(pick(rng, _SYLLABLES) for _ in range(between(rng, 2, 3))) + pick(rng, _ENDINGS)
        if on_side(f"name:{made}", split):
            return made[0].upper() + made[1:]


def name(rng: Random, split: Split) -> str:
    """A first name: half from the list, half invented from syllables."""
    return pick(rng, _NAMES[split]) if rng.random() < 0.5 else invented_name(rng, split)


def city(rng: Random, split: Split) -> str:
    return pick(rng, _CITIES[split]) if rng.random() < 0.65 else invented_name(rng, split)


def code(rng: Random, split: Split) -> str:
    """Two capital letters and three or four digits, such as "QX-4821"."""
    while True:
        made = f"{chr(between(rng, 65, 90))}{chr(between(rng, 65, 90))}-{between(rng, 100, 9999)}"
        if on_side(f"code:{made}", split):
            return made


def clock(rng: Random) -> str:
    return f"{between(rng, 0, 23):02d}:{5 * between(rng, 0, 11):02d}"


def day(rng: Random) -> str:
    return pick(rng, ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))


def date(rng: Random) -> str:
    return f"20{between(rng, 20, 39)}-{between(rng, 1, 12):02d}-{between(rng, 1, 28):02d}"


def distinct(rng: Random, make: Callable[[], str], count: int) -> list[str]:
    """`count` different values of a no-argument maker."""
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[make()] = None
    return list(seen)
