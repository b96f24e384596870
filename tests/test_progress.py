"""Progress is silent unless shown, and never changes what is iterated."""

from compress import progress


def test_nothing_is_shown_unless_asked_for(capsys):
    assert list(progress.track([1, 2], "work")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_logs_get_plain_lines_with_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "SHORT_S", 0.0)
    with progress.show_progress():
        assert list(progress.track(range(2), "work")) == [0, 1]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("work: 1 of 2, ")
    assert lines[0].endswith(" s left")
    assert lines[-1].startswith("work: done in ")


def test_a_note_stands_beside_the_count(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.show_progress(), progress.task("train", 10) as counter:
        counter.advance(5, "123 images/s")
    assert "train: 5 of 10" in capsys.readouterr().err


def test_what_was_done_before_does_not_shorten_what_is_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    clock = iter((0.0, 10.0, 20.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, 20.0))
    with progress.show_progress(), progress.task("train", 100, done=90) as counter:
        counter.advance(2)  # in ten seconds: eight are left, of five seconds each
    assert "train: 92 of 100, 40 s left" in capsys.readouterr().err


def test_millions_are_written_out(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.show_progress(), progress.task("train", 3_584_000.0) as counter:
        counter.advance(1_770_880.5)
    assert "train: 1,770,880.5 of 3,584,000, " in capsys.readouterr().err


def test_short_work_leaves_no_line(capsys):
    with progress.show_progress(), progress.task("quick", 1) as counter:
        counter.advance()
    assert capsys.readouterr().err == ""


def test_work_inside_work_is_gone_from_the_terminal_when_it_is_done():
    import io

    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=io.StringIO())) as bars:
        token = progress._bars.set(bars)
        try:
            with progress.task("outer"):
                list(progress.track([1, 2], "inner"))
                assert [task.description for task in bars.tasks] == ["outer"]
        finally:
            progress._bars.reset(token)
        assert bars.tasks[0].finished


def test_work_inside_work_leaves_a_line_in_a_log_only_if_it_took_long(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHORT_S", 0.0)
    with progress.show_progress(), progress.task("outer"):
        list(progress.track([1, 2], "inner"))
    assert capsys.readouterr().err.splitlines()[0].startswith("outer: done in")
