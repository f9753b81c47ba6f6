"""Prompts of many kinds that any chat model is asked, to be preserved beside the chats that a model writes itself."""

_ABOUT = {
    "What is the capital of {}?":
        "Norway, Denmark, Finland, Hungary, Belgium, Switzerland, Turkey, Iran, Pakistan, Vietnam, South Korea, "
        "Indonesia, Mexico, Peru, Chile, Morocco, Nigeria, Ethiopia, Ukraine, New Zealand",
    "Where is {} located?":
        "Machu Picchu, Big Ben, the Taj Mahal, the Sahara, Hollywood, Stonehenge, the Golden Gate Bridge, Mount "
        "Fuji, the Louvre, Lake Victoria",
    "In which country is {}?":
        "Barcelona, Sydney, Mumbai, Shanghai, Hamburg, Milan, Marseille, Manchester, Chicago, Osaka, Nestle's head "
        "office, Samsung's head office",
    "Who wrote {}?":
        "Macbeth, Emma, Jane Eyre, Frankenstein, Dracula, Crime and Punishment, The Iliad, Treasure Island, The "
        "Hobbit, Animal Farm, The Old Man and the Sea, A Christmas Carol, Ulysses, Les Misérables, the Harry "
        "Potter books, The Divine Comedy",
    "Who painted {}?":
        "The Scream, The Birth of Venus, Water Lilies, The Night Watch, Sunflowers, the ceiling of the Sistine "
        "Chapel",
    "Who composed {}?": "The Nutcracker, the Ninth Symphony, Messiah, The Planets, Swan Lake",
    "Who discovered {}?":
        "oxygen, X-rays, the structure of DNA, radioactivity, the moons of Jupiter, the planet Uranus, the "
        "circulation of the blood",
    "Who invented {}?":
        "dynamite, the radio, the airplane, the World Wide Web, the automobile, the thermometer, the cotton gin",
    "Who proposed {}?": "the laws of motion, quantum theory, the periodic table, the theory of continental drift",
    "Who founded {}?":
        "Netflix, Intel, Disney, Nike, Twitter, Toyota, Boeing, Starbucks, Harvard University, the Red Cross, "
        "Oracle, Dell",
    "Who is the CEO of {}?": "Apple, Google, Amazon, Facebook, Nvidia, IBM",
    "Who was the first {}?":
        "person in space, woman to win a Nobel Prize, prime minister of India, emperor of China, person to reach "
        "the South Pole, president of South Africa after apartheid",
    "What does {} make?":
        "Sony, Ford, Rolex, Airbus, Pfizer, Nintendo, Michelin, Canon, Gillette, Yamaha, Caterpillar, Heinz",
    "What does {} sell?": "McDonald's, Walmart, Amazon, Shell, Zara, Dunkin' Donuts, Gucci, Best Buy",
    "Where was {} born?":
        "Isaac Newton, Napoleon, Beethoven, Pablo Picasso, Mahatma Gandhi, Charles Darwin, Elvis Presley, Galileo "
        "Galilei, Sigmund Freud, Abraham Lincoln, Vincent van Gogh, Leonardo da Vinci",
    "Which instrument did {} play?":
        "Beethoven, Miles Davis, Eric Clapton, Paganini, John Coltrane, Elton John, Bach, Ringo Starr",
    "What was the profession of {}?":
        "Albert Einstein, Claude Monet, Florence Nightingale, Johann Sebastian Bach, Neil Armstrong, Jane Austen, "
        "Galileo Galilei, Muhammad Ali",
    "What is {} known for?":
        "Charlie Chaplin, Thomas Edison, Cleopatra, Rosa Parks, Stephen Hawking, Henry Ford, Mother Teresa, Bill "
        "Gates",
    "In which year did {}?":
        "the Second World War begin, the Korean War end, the Cold War end, the Roman Empire fall, the Soviet Union "
        "collapse, Napoleon die, India become independent, the Russian Revolution begin",
    "When was {}?":
        "the Magna Carta signed, the Eiffel Tower built, the Battle of Hastings, the Great Fire of London, the "
        "iPhone introduced, the Constitution of the United States signed, Google founded, Abraham Lincoln "
        "assassinated",
    "What is {}?":
        "8 plus 5, 9 minus 3, 4 times 4, 12 divided by 3, 15 plus 6, 30 minus 12, 2 times 9, the square of 7, 50 "
        "percent of 200",
    "What colour is {}?": "the sun, a carrot, blood, the ocean, a lemon, coal, an emerald, chocolate, a flamingo, milk",
    "How many {}?":
        "days are in a year, seconds are in a minute, legs does an insect have, planets are in the solar system, "
        "wheels does a car have, fingers does a hand have, strings does a guitar have, weeks are in a year, sides "
        "does a hexagon have, letters are in the Greek alphabet",
    "Which planet {}?": "is closest to the sun, has rings, is the hottest, do we live on",
    "What is the {}?":
        "largest country in the world, smallest country in the world, largest continent, deepest ocean, tallest "
        "animal, second largest planet, longest wall in the world, highest waterfall, fastest bird, largest island",
    "What is the chemical symbol for {}?": "silver, carbon, sodium, hydrogen, helium, lead",
    "What language is spoken in {}?": "Argentina, Austria, China, Portugal, Iran, Sweden, Greece",
    "What is the currency of {}?": "China, Mexico, Russia, the United States, Brazil, Switzerland",
    "What is the opposite of {}?": "up, fast, light, happy, old, rich",
    "What is the plural of {}?": "foot, tooth, sheep, knife, city",
    "What do {}?": "pandas eat, silkworms make, cats like to drink, chickens lay, doctors do, bakers make",
    "Which animal {}?":
        "is the tallest, gives us milk, is the fastest on land, has a trunk, is known as man's best friend",
    "What is the boiling point of {}?": "alcohol, water in Fahrenheit, nitrogen",
    "What is the name of {}?":
        "Sherlock Holmes's friend, the dog in Tintin, Mickey Mouse's girlfriend, the captain in Moby-Dick, Harry "
        "Potter's owl, the largest moon of Saturn",
    "How long {}?": "is a marathon, does a pregnancy last, is the Great Wall of China, does it take to boil an egg",
    "Which pet {}?": "is the most popular, needs to be walked every day, lives in a cage",
    "What is the mascot of {}?": "McDonald's, Michelin, the Chicago Bulls",
    "What is the logo of {}?": "Nike, Mercedes-Benz, Twitter",
}  # fmt: skip
"""Short questions about well-known things, by how they begin."""

FACTUAL = (
    "What is the capital of Portugal?", "What is the capital of Poland?", "What is the capital of Sweden?",
    "What is the capital of Kenya?", "What is the capital of Thailand?", "What is the capital of Argentina?",
    "What is the capital of Australia?", "What is the capital of Ireland?",
    "Which country is Budapest the capital of?", "Who wrote Hamlet?", "Who wrote War and Peace?",
    "Who wrote Moby-Dick?", "Who is the author of Oliver Twist?", "Who wrote Alice in Wonderland?",
    "Who painted The Last Supper?", "Who painted Girl with a Pearl Earring?", "Who composed the Moonlight Sonata?",
    "Who composed The Four Seasons?", "Who discovered radium?", "Who discovered America?",
    "Who invented the steam engine?", "Who invented the printing press?", "Who founded Ford Motor Company?",
    "Who founded Google?", "Who founded IKEA?", "Who is the founder of Walmart?",
    "Who was the chief executive of General Electric?", "Who runs Microsoft?", "What does Honda make?",
    "What does Samsung produce?", "What does Adidas sell?", "What does Coca-Cola sell?", "What does Lego make?",
    "Where is Sony based?", "In which city is BMW located?", "Where is the headquarters of Google?",
    "When was IBM founded?", "In which year was NASA established?", "When was the United Nations founded?",
    "What is the logo of Apple?", "What colour is the logo of Coca-Cola?", "What is the mascot of the Olympic Games?",
    "Where was Barack Obama born?", "Where was Marie Curie born?", "In which town was William Shakespeare born?",
    "What was the profession of Charles Dickens?", "What did Thomas Edison do for a living?",
    "Which instrument did Louis Armstrong play?", "Which instrument did Chopin play?",
    "Which pet did Franklin Roosevelt have?", "In which year did the French Revolution begin?",
    "When did the Berlin Wall fall?", "When did the American Civil War end?",
    "In which year did the First World War end?", "How many minutes are in an hour?", "How many hours are in a day?",
    "How many letters are in the English alphabet?", "How many sides does a triangle have?",
    "How many players are in a football team?", "How many states does the United States have?",
    "How long does the Earth take to go around the Sun?", "What is 3 plus 4?", "What is 6 times 7?",
    "What is 20 minus 8?", "What is half of 50?", "What is 100 divided by 4?", "What is the square root of 81?",
    "What colour is snow?", "What colour is a tomato?", "What colour do you get when you mix red and yellow?",
    "What is the smallest planet?", "What is the fastest land animal?", "What is the largest animal on Earth?",
    "What is the hardest natural substance?", "What is the longest river in South America?",
    "What is the highest mountain in Europe?", "Which ocean lies between Europe and America?",
    "Which is the largest desert in the world?", "What is the chemical symbol for iron?",
    "What is the chemical symbol for oxygen?", "What gas do humans breathe out?", "What is the speed of light?",
    "What language is spoken in Germany?", "What language is spoken in Egypt?", "What is the currency of Germany?",
    "What is the currency of India?", "What is the opposite of big?", "What is the plural of child?",
    "What is the past tense of go?", "What is a synonym of happy?", "What do cows eat?", "What do spiders make?",
    "What is the young of a dog called?", "Which animal gives us wool?", "What is the main ingredient of bread?",
    "What is cheese made from?", "Who was the first emperor of Rome?", "Who was Napoleon?",
    "Who is the hero of the Odyssey?", "What is the freezing point of water in Fahrenheit?",
)  # fmt: skip
"""Short questions with short answers."""

BRIEF = tuple(question.format(name) for question, names in _ABOUT.items() for name in names.split(", "))
"""More of them, of whose answers the beginning is enough."""

OPEN = (
    "Give me a recipe for tomato soup.", "Write a haiku about spring.", "How do I tie a tie?",
    "Explain gravity in simple words.", "What should I do on a rainy Sunday?",
    "Write a short letter to a friend who has moved away.", "Tell me a joke.", "Why is the sea salty?",
    "Summarise the story of Cinderella in three sentences.", "What are the advantages of public transport?",
    "Describe an old house at night.", "How can I save money?", "Write a Python function that reverses a string.",
    "Translate 'good morning' into Spanish.", "What is the difference between a frog and a toad?",
    "Give me five words that rhyme with 'light'.", "How does a refrigerator work?",
    "Suggest a title for a book about a lonely dragon.", "What makes people laugh?", "Who are you?",
    "What is your name?", "Can you help me plan a trip?", "Is it better to walk or to run?",
    "What happens after we die?", "Explain what a database is.", "Write an advertisement for a bakery.",
    "How do vaccines work?", "List the steps of the scientific method.",
    "Correct this sentence: she go to school yesterday.", "What do you think of modern art?",
)  # fmt: skip
"""Requests with longer answers."""

PLAIN = (
    "Glass is made by melting sand with soda and lime at about 1,500 degrees. While it is soft it can be blown, rolled "
    "or pressed into moulds; as it cools it becomes hard and brittle without ever forming crystals.",
    '"You are late again," said the teacher, and looked over her glasses. "The bus broke down, Miss," Tom answered, '
    "though his muddy shoes told another story. Nobody in the class believed him, and nobody said a word.",
    "The storm reached the coast shortly after midnight. Trees fell across several roads, and some four thousand "
    "households were without electricity until the morning. The fire brigade was called out more than sixty times.",
    "def average(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return total / "
    "len(numbers)\n\nprint(average([3, 5, 7]))",
    "To replace the filter, switch off the machine and unplug it. Open the cover on the left side, pull the old filter "
    "out, and rinse the housing with warm water. Insert the new one with the arrow pointing upwards.",
    "Dear Mr Collins,\n\nThank you for your letter of 3 May. We are sorry to hear that the parcel was damaged when it "
    "arrived. A new one will be sent to you this week, free of charge.\n\nYours sincerely,\nAnne Walters",
    "Between the two wars the city doubled in size. New suburbs were built along the tram lines, with schools, parks "
    "and public baths, and for the first time ordinary families had running water and a small garden.",
    "The heart is a muscle about the size of a fist. It beats some hundred thousand times a day and pumps blood "
    "through the arteries to every part of the body; through the veins the blood comes back to it.",
    "I did not expect much from this film, but the first half hour is very good. The actors are young and natural, the "
    "music is well chosen, and there are some truly funny scenes. Sadly the ending is far too long.",
    "Ingredients: 200 g flour, 100 g butter, 80 g sugar, one egg, a pinch of salt. Rub the butter into the flour, add "
    "the rest, and knead quickly. Leave the dough in a cold place for an hour before you roll it out.",
    "The tenant shall keep the flat in good order and tell the landlord of any damage without delay. The landlord may "
    "enter the flat only after giving notice of at least two days, except where there is danger.",
    "Snow had fallen all night, and in the morning the village lay silent. Smoke rose straight up from the chimneys. "
    "A dog barked once, far away, and then there was nothing but the creaking of our steps.",
    "In mathematics, a prime number is a whole number greater than one that can be divided only by one and by itself. "
    "There are infinitely many of them, as Euclid showed more than two thousand years ago.",
    "The home team won the match by two goals to one. After a slow start both sides had chances to score, but it took "
    "until the seventieth minute before a free kick found its way past the goalkeeper.",
    "Prices rose by three per cent last year, mainly because of food and energy. Economists expect that they will rise "
    "more slowly this year, although wages are going up and many firms say that they cannot find workers.",
    "Most birds build their nests in spring. Swallows use mud, weavers knot long blades of grass together, and cuckoos "
    "build none at all: they lay their eggs into the nests of other birds and leave the work to them.",
    "Marie Curie was born in Warsaw in 1867 and moved to Paris to study physics. Together with her husband Pierre she "
    "found two new elements, polonium and radium, and she is still the only person with Nobel Prizes in two sciences.",
    "Norway is a country in the north of Europe. Its capital is Oslo, and its long coast is known for deep fjords. "
    "Fishing, shipping and above all oil have made its five million people rich.",
    "Volvo was founded in Gothenburg in 1927. For most of its history it made cars, buses and lorries under one roof; "
    "since 1999 the cars have been built by a company of their own, which now belongs to Geely of China.",
    "Wolfgang Amadeus Mozart was an Austrian composer. He wrote his first pieces at the age of five, and when he died "
    "in Vienna at thirty-five he left more than six hundred works, among them The Magic Flute.",
    "The Amazon is the largest river in the world by the water it carries. It rises in the Andes of Peru, flows "
    "through the rain forest of Brazil, and enters the Atlantic Ocean near the city of Belem.",
    "Jane Goodall is an English zoologist who spent decades among the chimpanzees of Gombe in Tanzania. She was the "
    "first to see that they make tools, and later became known as a campaigner for the protection of nature.",
    "Nokia started in 1865 as a paper mill in Finland. It made rubber boots and cables before it turned to telephones, "
    "and around the year 2000 every third mobile phone in the world came from it.",
    "Istanbul is the largest city of Turkey and lies on two continents. Under the names of Byzantium and "
    "Constantinople it was the capital of two empires, and the Hagia Sophia still stands in its old centre.",
    "Charles Darwin sailed around the world on the Beagle from 1831 to 1836. What he saw on the Galapagos Islands led "
    "him to the idea of natural selection, which he published twenty years later.",
    "Cricket is played by two teams of eleven. A bowler throws the ball at three wooden stumps, and a batter tries to "
    "hit it away and to score runs. The game is most popular in India, Pakistan, Australia and England.",
    "Frida Kahlo was a Mexican painter who is best known for her portraits of herself. A bus accident at eighteen left "
    "her in pain for life; she began to paint in bed, with a mirror fixed above her.",
    "Mount Kilimanjaro in Tanzania is the highest mountain of Africa. It is 5,895 metres high, an old volcano standing "
    "alone in the plain, and although it lies close to the equator there is ice on its top.",
    "The telephone was patented by Alexander Graham Bell in 1876. Others, such as Elisha Gray and Antonio Meucci, had "
    "worked on the same idea, and for years the courts argued about who had been first.",
    "Honey bees live in colonies of up to sixty thousand. The queen lays the eggs, the workers feed the young, build "
    "the combs and gather nectar, and the drones do nothing but mate.",
    "Nelson Mandela was a lawyer in Johannesburg before he became a leader of the African National Congress. He spent "
    "twenty-seven years in prison and in 1994 was elected president of South Africa.",
    "Lego is a Danish company that makes plastic bricks. Its name comes from the words for play well, and its main "
    "office is in the small town of Billund, where the first of its parks was opened in 1968.",
    "Rome was, according to legend, founded by Romulus in 753 BC. It grew from a few huts on the hills by the Tiber "
    "to the centre of an empire that reached from Scotland to Egypt.",
    "Water boils at 100 degrees Celsius at sea level. On high mountains, where the pressure of the air is lower, it "
    "boils sooner, so that potatoes take longer to become soft.",
    "Ada Lovelace worked with Charles Babbage on his analytical engine, a mechanical computer that was never finished. "
    "Her notes of 1843 contain what many call the first program.",
    "Harvard University was founded in 1636 and is the oldest in the United States. It lies in Cambridge, across the "
    "river from Boston, and has about twenty thousand students.",
    "A violin has four strings, tuned in fifths. Its body is made of spruce and maple, and the bow is strung with "
    "horsehair. The most famous violins were built in Cremona by Antonio Stradivari.",
    "Kenya lies on the coast of East Africa. Nairobi is its capital, Swahili and English are its official languages, "
    "and tea, coffee and flowers are what it sells to the rest of the world.",
    "Albert Einstein played the violin all his life. He worked in the patent office in Bern when he published four "
    "papers in 1905, each of which would have been enough to make him famous.",
    "IKEA sells furniture that its customers put together at home. Ingvar Kamprad started it in 1943 as a mail order "
    "business in Sweden, and named it after himself, his parents' farm and its village.",
)  # fmt: skip
"""Plain text of several kinds, much of it about people, places and companies."""
