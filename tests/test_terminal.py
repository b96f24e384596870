"""What is printed where nobody looks at a terminal."""

from rich.console import Group
from rich.text import Text

from compress.cli.output import print_result
from compress.terminal import WIDE, table


def test_a_sentence_in_a_pipe_stays_on_its_line_and_a_table_keeps_its_width(capsys):
    sentence = " ".join(["the same answer for 100 % of images"] * 9)
    print_result(Group(table(("text",), [(sentence,)]), Text(sentence)))
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == sentence
    assert len(lines) > 4
    assert max(map(len, lines)) <= WIDE
