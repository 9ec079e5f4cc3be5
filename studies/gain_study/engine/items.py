"""What the multiple-choice items are made of: short tables of English words, of common facts and of common sense.

A line of a table is ``key: right, wrong, wrong, wrong``. Its template has a place for the key and is continued by one of
the choices. The wrong ones are near: other cities of the country, other forms of the verb.
"""

from __future__ import annotations

__all__ = ["AGREEMENT", "FACTS", "NOUNS", "SENSE", "WORDS", "Relation"]

Relation = tuple[str, str]
"""A template and its table."""

FACTS: tuple[Relation, ...] = (
    (
        "The capital city of {} is",
        """
        Australia: Canberra, Sydney, Melbourne, Perth
        Canada: Ottawa, Toronto, Montreal, Vancouver
        Turkey: Ankara, Istanbul, Izmir, Bursa
        Switzerland: Bern, Zurich, Geneva, Basel
        Vietnam: Hanoi, Saigon, Hue, Da Nang
        India: New Delhi, Mumbai, Kolkata, Chennai
        China: Beijing, Shanghai, Hong Kong, Nanjing
        Pakistan: Islamabad, Karachi, Lahore, Peshawar
        Spain: Madrid, Barcelona, Seville, Valencia
        Italy: Rome, Milan, Venice, Naples
        Germany: Berlin, Munich, Hamburg, Frankfurt
        Scotland: Edinburgh, Glasgow, Aberdeen, Dundee
        Poland: Warsaw, Krakow, Gdansk, Lodz
        Russia: Moscow, Saint Petersburg, Kazan, Omsk
        Japan: Tokyo, Kyoto, Osaka, Nagoya
        New Zealand: Wellington, Auckland, Christchurch, Dunedin
        Morocco: Rabat, Casablanca, Marrakesh, Fez
        Texas: Austin, Houston, Dallas, San Antonio
        California: Sacramento, Los Angeles, San Francisco, San Diego
        Florida: Tallahassee, Miami, Orlando, Tampa
        Ohio: Columbus, Cleveland, Cincinnati, Toledo
        Georgia in the United States: Atlanta, Savannah, Augusta, Macon
        Massachusetts: Boston, Worcester, Cambridge, Salem
        Illinois: Springfield, Chicago, Peoria, Rockford
        """,
    ),
    (
        "{} was written by",
        """
        Hamlet: Shakespeare, Marlowe, Milton, Chaucer
        War and Peace: Tolstoy, Dostoevsky, Chekhov, Pushkin
        Oliver Twist: Dickens, Hardy, Austen, Thackeray
        Pride and Prejudice: Austen, Dickens, Brontë, Eliot
        Don Quixote: Cervantes, Borges, Lorca, Dante
        The Divine Comedy: Dante, Virgil, Petrarch, Homer
        The Odyssey: Homer, Virgil, Plato, Sophocles
        The Republic: Plato, Aristotle, Homer, Cicero
        Faust: Goethe, Schiller, Kafka, Nietzsche
        The Origin of Species: Darwin, Newton, Huxley, Mendel
        Animal Farm: Orwell, Huxley, Wells, Golding
        The Old Man and the Sea: Hemingway, Faulkner, Steinbeck, Melville
        """,
    ),
    (
        "The {} is",
        """
        largest planet in the solar system: Jupiter, Saturn, Earth, Neptune
        planet closest to the sun: Mercury, Venus, Mars, Earth
        largest ocean on Earth: the Pacific, the Atlantic, the Indian, the Arctic
        tallest mountain on Earth: Mount Everest, Mont Blanc, Mount Kenya, Mount Fuji
        largest animal that has ever lived: the blue whale, the elephant, the giraffe, the white shark
        fastest animal on land: the cheetah, the lion, the horse, the greyhound
        chemical symbol for gold: Au, Ag, Go, Fe
        chemical symbol for iron: Fe, Ir, Au, In
        gas that plants take in from the air: carbon dioxide, oxygen, nitrogen, hydrogen
        organ that pumps blood through the body: the heart, the liver, the lung, the brain
        metal that is liquid at room temperature: mercury, iron, copper, silver
        hardest natural substance: diamond, iron, granite, gold
        """,
    ),
    (
        "A young {} is called a",
        """
        cow: calf, lamb, foal, cub
        goose: gosling, duckling, chick, kid
        horse: foal, calf, lamb, pup
        sheep: lamb, kid, calf, piglet
        goat: kid, lamb, calf, foal
        lion: cub, kitten, pup, calf
        swan: cygnet, gosling, duckling, chick
        deer: fawn, foal, calf, lamb
        seal: pup, cub, calf, kid
        frog: tadpole, fry, larva, chick
        kangaroo: joey, cub, kid, pup
        hare: leveret, kit, pup, cub
        """,
    ),
)

WORDS: tuple[Relation, ...] = (
    (
        "The opposite of {} is",
        """
        hot: cold, warm, heat, fire
        early: late, soon, morning, first
        rich: poor, wealthy, money, greedy
        war: peace, battle, army, fight
        guilty: innocent, crime, ashamed, judge
        deep: shallow, dark, high, sea
        ancient: modern, old, history, antique
        generous: selfish, kind, giving, noble
        arrive: depart, come, reach, enter
        brave: cowardly, bold, strong, hero
        success: failure, victory, effort, fame
        remember: forget, recall, memory, think
        increase: decrease, grow, rise, add
        borrow: lend, take, keep, steal
        sharp: dull, pointed, knife, cut
        rough: smooth, hard, coarse, stone
        public: private, common, people, open
        maximum: minimum, most, highest, total
        permanent: temporary, lasting, constant, fixed
        wide: narrow, broad, long, large
        lazy: hardworking, idle, tired, slow
        simple: complex, easy, plain, single
        cruel: kind, mean, evil, harsh
        victory: defeat, triumph, battle, glory
        """,
    ),
    (
        "Every day they {}. They have always",
        """
        go: gone, went, goes, going
        see: seen, saw, sees, seeing
        write: written, wrote, writes, writing
        eat: eaten, ate, eats, eating
        speak: spoken, spoke, speaks, speaking
        drive: driven, drove, drives, driving
        sing: sung, sang, sings, singing
        swim: swum, swam, swims, swimming
        fly: flown, flew, flies, flying
        begin: begun, began, begins, beginning
        grow: grown, grew, grows, growing
        drink: drunk, drank, drinks, drinking
        """,
    ),
    (
        "Here is one {}, and there are two",
        """
        mouse: mice, mouse, mouses, mices
        child: children, child, childs, childrens
        foot: feet, foot, foots, feets
        tooth: teeth, tooth, tooths, teeths
        goose: geese, goose, gooses, geeses
        leaf: leaves, leaf, leafs, leave
        wolf: wolves, wolf, wolfs, wolve
        sheep: sheep, sheeps, sheepes, ship
        ox: oxen, ox, oxes, oxens
        woman: women, woman, womans, womens
        city: cities, city, citys, cites
        potato: potatoes, potato, potatos, potatose
        """,
    ),
    (
        "The word {} means almost the same as",
        """
        huge: enormous, tiny, average, strange
        begin: start, finish, wait, stop
        silent: quiet, loud, noisy, angry
        angry: furious, calm, happy, afraid
        purchase: buy, sell, lend, give
        assist: help, harm, hinder, leave
        weary: tired, fresh, lively, hungry
        rapid: fast, slow, steady, late
        conceal: hide, show, find, break
        courage: bravery, fear, anger, wisdom
        error: mistake, truth, answer, proof
        vacant: empty, full, busy, large
        """,
    ),
)

SENSE: tuple[Relation, ...] = (
    (
        "{}, because",
        """
        He put on a coat: it was cold, it was warm, it was late, it was cheap
        She opened her umbrella: it was raining, it was sunny, it was Sunday, it was broken
        He drank three glasses of water: he was thirsty, he was asleep, he was drowning, he was full
        She turned on the lamp: it was dark, it was bright, it was noon, it was hot
        He could not open the door: it was locked, it was open, it was new, it was brown
        She went to bed early: she was tired, she was awake, she was hungry, she was tall
        He called the fire brigade: the house was burning, the house was old, the house was empty, the house was sold
        She whispered: the baby was sleeping, the baby was laughing, the baby was crying, the baby was playing
        The car stopped in the desert: it had no fuel, it had no radio, it had four doors, it had four wheels
        He took off his shoes: his feet hurt, his head hurt, his eyes hurt, his teeth hurt
        She could not read the letter: she had no glasses, she had no gloves, she had no shoes, she had no umbrella
        The ice cream melted: the sun was hot, the wind was cold, the night was dark, the bowl was red
        The boy cried: he had lost his toy, he had won the game, he had eaten a cake, he had met a friend
        The plant died: nobody watered it, nobody touched it, nobody painted it, nobody sold it
        The players were happy: they had won, they had lost, they had failed, they had missed
        The man limped: he had hurt his leg, he had hurt his hand, he had hurt his ear, he had hurt his pride
        """,
    ),
    (
        "{}. Soon",
        """
        He dropped the egg on the floor: it broke, it bounced, it froze, it sang
        She put the kettle on the fire: the water boiled, the water froze, the water laughed, the water sang
        They planted the seeds and it rained: flowers grew, stones grew, houses grew, fish grew
        The cat saw a mouse: it ran after it, it flew over it, it read about it, it wrote to it
        He lay in the sun all day: his skin was red, his skin was green, his skin was cold, his skin was wet
        She pushed the glass off the table: it was in pieces, it was in love, it was in school, it was in bloom
        He had not slept for two days: he fell asleep, he fell in love, he fell silent, he fell downstairs twice
        The snowman stood in the sun: it melted, it burned, it grew, it danced
        She lit the candle: it gave light, it gave milk, it gave water, it gave advice
        The boy ate too many sweets: his stomach hurt, his elbow hurt, his shoe hurt, his hair hurt
        The bucket had a hole in it: the water ran out, the water ran in, the water ran up, the water ran home
        He watered the dry lawn each day: the grass was green, the grass was gone, the grass was blue, the grass was loud
        """,
    ),
    (
        "You would use {} to",
        """
        a broom: sweep the floor, cut the bread, dig a hole, write a note
        a needle: sew a button, dig a hole, boil an egg, sweep the floor
        a shovel: dig a hole, sew a button, comb your hair, write a note
        a ruler: draw a line, boil an egg, catch a fish, cut the bread
        a net: catch a fish, draw a line, drive a nail, light a fire
        a hammer: drive a nail, comb your hair, sew a button, catch a fish
        a match: light a fire, drive a nail, sweep the floor, wash your hands
        a towel: dry your hands, light a fire, drive a nail, tell the time
        a clock: tell the time, dry your hands, catch a fish, open a can
        a pan: fry an egg, tell the time, draw a line, mend a sock
        a ladder: reach the roof, fry an egg, wash your hands, tell the time
        a key: open the door, reach the roof, fry an egg, dry your hands
        """,
    ),
    (
        "{} a",
        """
        He cut the bread with: knife, spoon, pillow, towel
        She wrote her name with: pen, fork, cup, shoe
        The farmer milked: cow, hen, pig, snake
        The king and the queen lived in: castle, barn, nest, shop
        The bird laid its eggs in: nest, kennel, pocket, shoe
        The sailors crossed the sea in: ship, train, bus, cart
        He paid for the meal with: card, song, stone, smile
        She tied the parcel with: ribbon, stone, spoon, pipe
        The nurse gave the sick child: pill, hammer, ticket, debt
        The thief was locked up in: cell, song, garden, story
        The hunter shot: deer, letter, cloud, chair
        The spider sat in: web, car, bank, song
        The child blew up: balloon, book, spoon, potato
        The teacher wrote on: blackboard, window, spoon, cloud
        He ate the soup with: spoon, knife, comb, pencil
        The passengers waited for: train, stone, doctor, lion
        The gardener planted: tree, lamp, stone, shoe
        The pianist sat down at: piano, river, window, shop
        The tailor sewed: shirt, wall, cake, road
        The dog chewed: bone, song, cloud, river
        """,
    ),
)

NOUNS = ("teacher", "dog", "friend", "doctor", "student", "sister", "horse", "bird", "farmer", "writer", "king", "girl")
"""Their plurals end in s."""

AGREEMENT = (
    # places for a noun and for one of the other number; what follows the first where it is one, and where it is many
    ("The {} near the {}", "is", "are"),
    ("The {} behind the {}", "was", "were"),
    ("The {} with the {}", "has", "have"),
    ("The {} from the town of the {} often", "needs", "need"),
)
