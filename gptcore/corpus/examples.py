"""One text of each kind shows the teacher how long and how plain an answer is meant to be.

A small teacher follows an example far better than an instruction. They are written by hand, and a
text that comes too near to one is refused as its near duplicate.
"""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "tale": (
        (
            "Write a short tale about a snowman named Bo who wants to see the sea.",
            "Bo was a snowman who stood in a quiet garden. He had never seen the sea, but he "
            'dreamed of it every night. One day a girl named Ana said, "I can show you." She put a '
            'bowl of water in front of him and made waves with her hand. Bo laughed. "It is '
            'small," he said, "but it is the best sea in the world." When spring came, Bo melted, '
            "and he ran down the hill, into the river, and all the way to the real sea.",
        ),
        (
            "Write a short tale about a mouse named Ina who finds a bell. It ends with a new "
            "friendship.",
            "Ina the mouse found a silver bell under the stairs. She rang it, and at once the old "
            'cat woke up. Ina wanted to run, but the cat only smiled. "I have looked for that bell '
            'for years," he said. "Without it, nobody hears me coming, and so nobody ever says '
            'hello." Ina tied the bell around his neck. From that day on, she always knew when her '
            "friend was near, and she always said hello first.",
        ),
        (
            "Write a funny tale about a king named Aldo in a kitchen.",
            "King Aldo wanted to make pancakes all by himself. He sent the cook away and put on a "
            "white apron. First he broke ten eggs, but most of them fell on the floor. Then he "
            "threw the pancake so high that it stuck to the ceiling. The king waited and waited. "
            "At last the pancake came down and landed on his head, just when the queen walked in. "
            '"What a lovely new crown," she said. They both laughed, and then they called the '
            "cook.",
        ),
        (
            "Write a warm tale about Jory and Kim at a bus stop in the rain.",
            "It was raining, and the bus was late. Jory had an umbrella, but it had a big hole in "
            "the middle. Kim had no umbrella at all, but she had a bag of warm chestnuts. They "
            'looked at each other for a while. "I will share my roof if you share your lunch," '
            "said Jory. So they stood close together under the broken umbrella and ate. When the "
            "bus came, they let it go, because the chestnuts were not finished yet.",
        ),
    ),
    "explanation": (
        (
            "Explain how a pot of water boils to a curious child.",
            "Water is made of tiny parts that never stand still. When the stove is cold, they move "
            "slowly. The fire gives them heat, and heat makes them run faster and faster. At last "
            "some of them run so fast that they jump away from the others and turn into steam. "
            "The steam makes bubbles at the bottom of the pot, and the bubbles rise to the top. "
            "That is why hot water dances.",
        ),
        (
            "Explain why we say thank you to a child of six. Use one example from daily life.",
            'When someone helps us, they give us a bit of their time. Saying "thank you" shows '
            "that we have seen it. Think of a friend who holds the door for you when your hands "
            "are full. If you walk by without a word, your friend may feel a little sad. If you "
            "smile and say thank you, your friend feels glad and will hold the door again. Two "
            "small words can make two people happy.",
        ),
        (
            "Explain how a pair of glasses helps the eyes. Begin with a question.",
            "Have you seen how a straw looks bent in a glass of water? That happens because water "
            "and glass can bend light. Inside each eye there is a small lens that bends light too, "
            "so that a sharp picture falls on the back of the eye. In some eyes the picture falls "
            "too far in front or too far behind, and everything looks blurry. A pair of glasses "
            "bends the light a little more, and the picture lands in the right place.",
        ),
    ),
    "scene": (
        (
            "Write a short scene in which Hal, an old sailor, talks with a boy named Eli.",
            'Hal sat on a barrel and looked at the water. "Are you sad?" asked Eli. "No," said '
            'Hal. "I am listening." Eli sat down beside him. "To what?" "To the waves. They tell '
            'me where they have been." Eli listened for a long time. "I think this one was in '
            'Africa," he said at last. Hal smiled and gave him half of his bread. "You will be a '
            'good sailor," he said.',
        ),
        (
            "Write a short scene in which Ruth and Dan talk about a broken cup.",
            '"Who broke my blue cup?" asked Ruth. Dan looked at his shoes. "It was the wind," he '
            'said. Ruth went to the window. It was closed. "The wind must have a key," she said. '
            'Dan\'s face turned red. "I broke it," he whispered. "I wanted to make tea for you." '
            'Ruth picked up the pieces and smiled. "Then let us make tea together," she said, "and '
            'after that we will look for some glue."',
        ),
    ),
}
"""By kind: (what is asked, the answer)."""
