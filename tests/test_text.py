"""Text for speech: a table of written and spoken lines, sentences, clauses and pauses."""

import itertools
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm import PromptError
from csm.text import ClauseBuffer, Pause, normalize, parse_pauses, split

# written => spoken, by hand
TABLE = """
Hello there. => Hello there.
I have 3 cats. => I have three cats.
It took 21 days. => It took twenty-one days.
There are 105 rooms. => There are one hundred and five rooms.
We counted 1,234 birds. => We counted one thousand two hundred and thirty-four birds.
1,000,000 people came. => One million people came.
It is -5 outside. => It is minus five outside.
Pi is 3.14159. => Pi is three point one four one five nine.
Add .5 to it. => Add point five to it.
See [the page](https://example.org/A_(b)) now. => See the page now.
Agent 007 arrived. => Agent zero zero seven arrived.
1234567890123456 => One two three four five six seven eight nine zero one two three four five six
Pages 10-12 are missing. => Pages ten to twelve are missing.
They won 3–2. => They won three to two.
She came 1st. => She came first.
The 22nd time. => The twenty-second time.
On the 3rd day. => On the third day.
The 21st century. => The twenty-first century.
Add 1/2 cup. => Add one half cup.
Use 3/4 of it. => Use three quarters of it.
It is 2/3 full. => It is two thirds full.
Wait 2 1/2 hours. => Wait two and a half hours.
A 3½ star film. => A three and a half star film.
¼ of them left. => One quarter of them left.
The odds are 5/128. => The odds are five over one hundred and twenty-eight.
Call #5 now. => Call number five now.
It is 3x faster. => It is three times faster.
A 4x4 grid. => A four by four grid.
A screen of 640x480. => A screen of six hundred and forty by four hundred and eighty.
In 1984 it rained. => In nineteen eighty-four it rained.
Since 2005 it has grown. => Since two thousand and five it has grown.
By 2024 it was done. => By twenty twenty-four it was done.
In 1905 he wrote four papers. => In nineteen oh five he wrote four papers.
The year 2000 came. => The year two thousand came.
From 1914-1918 there was war. => From nineteen fourteen to nineteen eighteen there was war.
The 1990s were loud. => The nineteen nineties were loud.
Music of the '80s. => Music of the eighties.
The 1920's style. => The nineteen twenties style.
The season of 2023-24. => The season of twenty twenty-three to twenty-four.
Born on March 5, 1984. => Born on March fifth, nineteen eighty-four.
Born on 5 March 1984. => Born on the fifth of March nineteen eighty-four.
See you on July 4th. => See you on July fourth.
The 4th of July is near. => The fourth of July is near.
Due 2024-03-05. => Due March fifth, twenty twenty-four.
Due 12/25/2023. => Due December twenty-fifth, twenty twenty-three.
Due 25/12/2023. => Due December twenty-fifth, twenty twenty-three.
Logged at 2024-03-05T14:30:00Z. => Logged at March fifth, twenty twenty-four at fourteen thirty.
In Sept. 2021 we met. => In September twenty twenty-one we met.
On Jan. 2 we start. => On January second we start.
Mon., 3 p.m. => Monday, three P M.
We meet at 3:30. => We meet at three thirty.
We meet at 3:05. => We meet at three oh five.
We meet at 3:00. => We meet at three o'clock.
We meet at 3:00 pm. => We meet at three P M.
The train leaves at 15:45. => The train leaves at fifteen forty-five.
The train leaves at 00:00. => The train leaves at midnight.
Open 9am to 5pm. => Open nine A M to five P M.
Wake me at 6:30 a.m. please. => Wake me at six thirty A M please.
The time was 1:02:03. => The time was one oh two and three seconds.
We are open 24/7. => We are open twenty-four seven.
It costs $5. => It costs five dollars.
It costs $1. => It costs one dollar.
It costs $5.50. => It costs five dollars and fifty cents.
It costs $0.99. => It costs ninety-nine cents.
It costs $1.01. => It costs one dollar and one cent.
It costs $20.00. => It costs twenty dollars.
It costs $1,250. => It costs one thousand two hundred and fifty dollars.
A $3.5 million house. => A three point five million dollars house.
Sales of $5M. => Sales of five million dollars.
Sales of €2bn. => Sales of two billion euros.
It costs €10. => It costs ten euros.
It costs 10€. => It costs ten euros.
It costs 10 € here. => It costs ten euros here.
It costs £1.50. => It costs one pound and fifty pence.
It costs ¥500. => It costs five hundred yen.
It costs 50 USD. => It costs fifty dollars.
Between $5-10 each. => Between five to ten dollars each.
A loss of -$5. => A loss of minus five dollars.
Only 99¢ today. => Only ninety-nine cents today.
About 5% of it. => About five percent of it.
Between 5-10% of it. => Between five to ten percent of it.
It fell 0.5%. => It fell zero point five percent.
It is 5 km away. => It is five kilometers away.
It is 1 km away. => It is one kilometer away.
Drive 60 mph. => Drive sixty miles per hour.
Drive 100 km/h. => Drive one hundred kilometers per hour.
A 5kg bag. => A five kilograms bag.
It weighs 150 lbs. => It weighs one hundred and fifty pounds.
Add 250 ml of milk. => Add two hundred and fifty milliliters of milk.
It is 20°C today. => It is twenty degrees Celsius today.
It is -5 °F today. => It is minus five degrees Fahrenheit today.
Turn 90° left. => Turn ninety degrees left.
A room of 30 m². => A room of thirty square meters.
16 GB of memory. => Sixteen gigabytes of memory.
A 3.5 GHz chip. => A three point five gigahertz chip.
It ran at 60 fps. => It ran at sixty frames per second.
It took 80 ms. => It took eighty milliseconds.
Wait 10 s. => Wait ten seconds.
He is 6'2" tall. => He is six foot two tall.
Take 5-10 mg daily. => Take five to ten milligrams daily.
I owe him 10K. => I owe him ten thousand.
Dr. Smith is in. => Doctor Smith is in.
Mr. and Mrs. Jones left. => Mister and Missus Jones left.
Prof. Lee spoke. => Professor Lee spoke.
St. Mary wept. => Saint Mary wept.
He lives on Main St. => He lives on Main Street.
He lives at 12 Oak Ave. today. => He lives at twelve Oak Avenue today.
He left. 5 came. => He left. Five came.
The iPhone 15 is out. => The iPhone fifteen is out.
Fruit, e.g. apples. => Fruit, for example apples.
That is, i.e. never. => That is, that is never.
Apples, pears, etc. => Apples, pears, et cetera.
Cats vs. dogs. => Cats versus dogs.
It is approx. five. => It is approximately five.
See fig. 3. => See figure three.
See p. 12. => See page twelve.
Read vol. 2 first. => Read volume two first.
Symphony No. 9 is long. => Symphony number nine is long.
Say no. Then leave. => Say no. Then leave.
King Jr. spoke. => King Junior spoke.
Acme Inc. grew. => Acme Incorporated grew.
The U.S. economy grew. => The U S economy grew.
He moved to the U.S.A. => He moved to the U S A.
NASA launched it. => NASA launched it.
He has a Ph.D. in maths. => He has a P H D in maths.
In 44 B.C. he died. => In forty-four B C he died.
World War II ended. => World War two ended.
Chapter IV begins. => Chapter four begins.
Louis XIV reigned. => Louis the fourteenth reigned.
Henry VIII married. => Henry the eighth married.
I am here. => I am here.
Mail john.doe@example.com now. => Mail john dot doe at example dot com now.
Mail a_b+c@mail.example.co.uk. => Mail a underscore b plus c at mail dot example dot co dot U K.
Go to https://www.example.com/docs. => Go to example dot com slash docs.
Go to http://example.org/?q=1#top now. => Go to example dot org now.
Visit www.example.com, please. => Visit example dot com, please.
Visit example.io today. => Visit example dot I O today.
Open report.pdf first. => Open report dot pdf first.
Run main.py again. => Run main dot py again.
Ping 192.168.0.1 now. => Ping one nine two dot one six eight dot zero dot one now.
Call 555-123-4567. => Call five five five, one two three, four five six seven.
Call (555) 123-4567 now. => Call five five five, one two three, four five six seven now.
Call +1 555 123 4567. => Call plus one, five five five, one two three, four five six seven.
Install v2.1 today. => Install version two point one today.
Install 1.26.4 today. => Install one point twenty-six point four today.
Python 3.11 is out. => Python three point one one is out.
Play the mp3 file. => Play the mp three file.
Print it on A4 paper. => Print it on A four paper.
COVID-19 spread. => COVID nineteen spread.
Take the I-95 north. => Take the I ninety-five north.
It holds 6.02e23 atoms. => It holds six point zero two times ten to the power of twenty-three atoms.
E = mc² is famous. => E equals mc squared is famous.
Write it in C++ or C#. => Write it in C plus plus or C sharp.
A ratio of 1:1 is fair. => A ratio of one to one is fair.
ISBN 978-3-16 here. => ISBN nine seven eight, three, one six here.
5 km² of land. => Five square kilometers of land.
Compute x^2 now. => Compute x squared now.
Compute 2^10 now. => Compute two to the power of ten now.
2 + 2 = 4. => Two plus two equals four.
If x < 5 stop. => If x is less than five stop.
If x > 5 stop. => If x is greater than five stop.
It is ~5 years old. => It is about five years old.
5 ± 1 of them. => Five plus or minus one of them.
3 × 4 is twelve. => Three by four is twelve.
10 ÷ 2 is five. => Ten divided by two is five.
Salt & pepper. => Salt and pepper.
R&D costs money. => R and D costs money.
Yes and/or no. => Yes and or no.
He/she may go. => He or she may go.
Tea w/ milk. => Tea with milk.
Tea w/o milk. => Tea without milk.
A → B is a step. => A to B is a step.
Use snake_case here. => Use snake case here.
Follow @sesame today. => Follow at sesame today.
Tag it #speech today. => Tag it hashtag speech today.
See § 5 below. => See section five below.
© 2024 Acme. => Copyright twenty twenty-four Acme.
Acme™ is here. => Acme is here.
**Bold** words. => Bold words.
*Italic* words. => Italic words.
__Strong__ and _soft_. => Strong and soft.
~~Gone~~ again. => Gone again.
Run `make test` now. => Run make test now.
# A heading => A heading.
## What now? => What now?
- A list item => A list item
* Another item => Another item
+ A third item => A third item
- [x] Done item => Done item
1. Wash it. => One, Wash it.
> A quoted line. => A quoted line.
See [the docs](https://example.com). => See the docs.
![A cat](cat.png) sits. => A cat sits.
It is true.[1] => It is true.
It is true [1, 2]. => It is true.
It is so[^3]. => It is so.
| Name | Age | => Name, Age.
|---|---| =>
--- =>
*** =>
<b>Bold</b> text. => Bold text.
Line<br>break. => Line break.
Write `<div>` or ``</p>`` here. => Write div or /p here.
The `tag` <b>is</b> a `word`. => The tag is a word.
a <b and c> d => A b and c d
Dear <name>, hello. => Dear name, hello.
A <div class="x" hidden>box</div> and <input disabled>. => A box and.
<p lang=en>Yes</p> <speak>no<break time='1s'/></speak> => Yes no
Write &lt;div&gt; here. => Write div here.
The tag &lt;img src="a.png"&gt; ends. => The tag img src "a dot png" ends.
2 &lt; 3 &amp; 4 &gt; 1 => Two is less than three and four is greater than one
See <https://example.com> or <joe@example.com>. => See example dot com or joe at example dot com.
Salt &amp; pepper. => Salt and pepper.
Escaped \\*star\\*. => Escaped star.
He (my uncle) left. => He, my uncle, left.
He left (at last). => He left, at last.
(Nothing here.) => Nothing here.
The file(s) moved. => The files moved.
It was [sic] so. => It was so.
He said {this} once. => He said, this, once.
An array [one] here. => An array, one, here.
I love it ❤️! => I love it!
Well done 👍🏽 all. => Well done all.
🎉🎉🎉 =>
Great job 😀. => Great job.
I am glad :) today. => I am glad today.
It is done ✓ now. => It is done check now.
“Quoted” and ‘so’. => "Quoted" and 'so'.
It’s fine. => It's fine.
Wait… what? => Wait... what?
Wait.... what? => Wait... what?
Stop!!! => Stop!
Really??? => Really?
What?! => What?!
One — two. => One, two.
One -- two. => One, two.
One - two. => One, two.
A well-known fact. => A well-known fact.
Too   many    spaces. => Too many spaces.
A\u00a0hard space. => A hard space.
Soft\u00adhyphen. => Softhyphen.
A , b . => A, b.
=>
... =>
!!! =>
Café costs 3 €. => Café costs three euros.
Naïve résumé. => Naïve résumé.
日本 is Japan. => 日本 is Japan.
He ran 26.2 miles in 3:59:59. => He ran twenty-six point two miles in three fifty-nine and fifty-nine seconds.
By 3/5/24 Dr. Lee paid $2.75. => By March fifth, twenty twenty-four Doctor Lee paid two dollars and seventy-five cents.
"""
LINES = [tuple(part.strip() for part in line.split("=>")) for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize(("written", "spoken"), LINES)
def test_table(written, spoken):
    assert normalize(written.replace("\\\\", "\\")) == spoken


def test_the_table_has_200_lines():
    assert len({written for written, _ in LINES}) == len(LINES) >= 200


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_is_normalised(text):
    """No input fails, and no ASCII digit is left."""
    assert not set(normalize(text)) & set("0123456789")


@pytest.mark.parametrize(
    "piece",
    [
        *("[pause ", "[x](", "a.", "a@", "**a", "_a ", "<a ", "&lt;a", "<!-- ", "http://", "| a ", "1. "),
        *("\n", " \n", "\t", "\r\n", "\n- "),
    ],
)
def test_time_grows_with_the_text_alone(piece):
    """Ten times as much of what begins something and does not end it: a quadratic rule takes 100 times as long."""

    def seconds(count):
        started = time.process_time()
        normalize(f"a{piece * count}b")
        return time.process_time() - started

    seconds(10)
    assert seconds(5000) < 30 * seconds(500) + 0.1


def test_what_is_no_unicode_is_named():
    assert normalize("caf\udce9") == "Caf\udce9"
    with pytest.raises(PromptError, match="Unicode"):
        split("caf\udce9 au lait. Yes.")


def test_a_document_of_markdown():
    page = "# Title\n\n```python\nx = 1\n```\n\n- one\n- **two**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert split(normalize(page)) == ["Title.", "X equals one", "One", "Two", "a, b.", "One, two."]


SENTENCES = {
    "Hello there. How are you? Fine!": ["Hello there.", "How are you?", "Fine!"],
    "Dr. Smith met Mr. J. R. Tolkien at 3 p.m. today. He left.": [
        "Dr. Smith met Mr. J. R. Tolkien at 3 p.m. today.",
        "He left.",
    ],
    "One line\nof a sentence. Two.": ["One line of a sentence.", "Two."],
    "First\n\nSecond": ["First", "Second"],
    "# Title\nText here.": ["# Title", "Text here."],
    "Buy:\n- milk\n- eggs and\n  bread\n1. one\n2) two": ["Buy:", "- milk", "- eggs and bread", "1. one", "2) two"],
    "  \n\t\n": [],
    "... !!! -- 。": [],
    "": [],
    'He said: "Go." She went.': ['He said: "Go."', "She went."],
}


@pytest.mark.parametrize("text", SENTENCES)
def test_sentences(text):
    assert split(text) == SENTENCES[text]


CLAUSES = {
    "A first clause, a second clause; and the third one.": ["A first clause, a second clause;", "and the third one."],
    "one two three four five six seven": ["one two three four", "five six seven"],
    "We went home because the rain had come down": ["We went home", "because the rain had come down"],
    "x" * 90: ["x" * 40, "x" * 40, "x" * 10],
}


@pytest.mark.parametrize("text", CLAUSES)
def test_what_is_too_long_becomes_clauses(text):
    limit = 40 if len(text) > 35 else 20
    assert split(text, limit) == CLAUSES[text]


@given(
    st.lists(st.sampled_from(["word", "a", "and", "x" * 60, "end.", "so,", "well;"]), max_size=60), st.integers(5, 80)
)
@settings(max_examples=40, deadline=None)
def test_splitting_keeps_every_word(words, limit):
    parts = split(" ".join(words), limit)
    assert "".join("".join(parts).split()) == "".join(words)
    assert all(0 < len(part) <= limit for part in parts)


def test_pauses():
    assert parse_pauses("One. [pause 0.5] Two.[Pause 1s][pause .25]") == [
        *("One. ", Pause(0.5), " Two.", Pause(1.0), Pause(0.25)),
    ]
    assert parse_pauses("No pause [here].") == ["No pause [here]."]
    assert parse_pauses(" \n") == []


@pytest.mark.parametrize("markup", ["[pause -1]", "[pause 61]", "[pause 1e9]", "[pause 2 minutes]", "[pause 0,5]"])
def test_bad_pauses(markup):
    with pytest.raises(PromptError, match=r"pause 0\.5"):
        parse_pauses(f"One {markup} two.")


def test_a_pause_without_a_length_is_text():
    """As other brackets are, but not in a script."""
    for words in ("[Pause]", "[pause]", "[pause long]", "[Pause for applause]", "[paused]"):
        assert parse_pauses(f"He waited. {words} Then he spoke.") == [f"He waited. {words} Then he spoke."]
    assert normalize("He waited. [Pause] Then he spoke.") == "He waited. Pause, Then he spoke."
    for words in ("[Pause]", "[pause long]"):
        with pytest.raises(PromptError, match=r"pause 0\.5"):
            parse_pauses(f"One {words} two.", strict=True)


TALK = "Well, I think so. Dr. Smith said [that is, yesterday] that it works, more or less, and we agreed! The end"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_become_whole_clauses(size):
    buffer = ClauseBuffer(min_chars=10)
    clauses = [clause for at in range(0, len(TALK), size) for clause in buffer.push(TALK[at : at + size])]
    assert clauses == [
        "Well, I think so.",
        "Dr. Smith said [that is, yesterday] that it works,",
        "more or less,",
        "and we agreed!",
    ]
    assert buffer.flush() == ["The end"]
    assert buffer.flush() == []


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab .,;!?\n\"')[]A", max_size=120),
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.booleans(),
)
def test_the_division_into_pieces_changes_nothing(text, sizes, sentences):
    def clauses(pieces):
        buffer = ClauseBuffer(min_chars=5, max_chars=20, sentences=sentences)
        return [*(clause for piece in pieces for clause in buffer.push(piece)), *buffer.flush()]

    pieces, rest = [], text
    for size in itertools.cycle(sizes):
        if not rest:
            break
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    whole = clauses([text])
    assert clauses(pieces) == whole
    assert all(0 < len(clause) <= 20 for clause in whole)
    assert "".join("".join(whole).split()) == "".join(text.split())


def test_text_without_an_end_is_divided_between_words():
    buffer = ClauseBuffer(min_chars=5, max_chars=12)
    assert buffer.push("one two three four five ") == ["one two", "three four"]
    assert buffer.push("a" * 30) == ["five", "a" * 12, "a" * 12]
    assert (buffer.num_chars, buffer.flush(), buffer.num_chars) == (6, ["a" * 6], 0)


def test_sentences_instead_of_clauses():
    buffer = ClauseBuffer(sentences=True)
    assert buffer.push("Well, I think so, yes; I do. And") == ["Well, I think so, yes; I do."]


def test_importing_is_light():
    code = "import csm, csm.text, sys; assert not {'num2words', 'sentencex', 'sounddevice'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
