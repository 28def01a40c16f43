"""A run in the terminal, on the page, over HTTP, and as TensorBoard scalars."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path

import pytest

from nnunet_fedharm import cli
from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.evaluation.watch.page import render_watch_page
from nnunet_fedharm.evaluation.watch.server import page_server
from nnunet_fedharm.evaluation.watch.words import duration
from nnunet_fedharm.federation.watch.reading import read_run
from tests.federation.watching import START, Log, at


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Two rounds are done, the third runs; C was set aside in the second, with markup in its reason."""
    made = Log(tmp_path)
    made.begin()
    made.whole_round(10, 1, epsilon=1.5)
    made.round_start(40, 2)
    made.trained(50, "A", 2, epsilon=2.5)
    made.trained(51, "B", 2, epsilon=2.0, dice=0.5)
    made.write(52, "site_set_aside", site="C", phase="segmenter", round=2, reason="<script>alert(1)</script> NaN")
    made.round_end(60, 2, sites="AB")
    made.round_start(60, 3)
    made.trained(70, "A", 3)
    return made


def test_status_shows_everything_and_its_exit_status_tells_good_from_bad(
    log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = str((datetime.now(UTC) - START).total_seconds() + 1000)
    assert cli.main(["status", "--root", str(tmp_path), "--stalled-after", old]) == 0
    shown = capsys.readouterr().out
    for words in ("running", "segmenter round 3 of 10", "0.500 (B)", "late", "2.5", "C: <script>", "2.9 KiB"):
        assert words in shown
    assert cli.main(["status", "--root", str(tmp_path)]) == 1
    assert "stalled" in capsys.readouterr().out
    log.write(80, "finished", results="/r", sites_without_model=[])
    assert cli.main(["status", "--server-root", str(log.folder), "--watch"]) == 0
    assert cli.main(["status", "--root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == "finished"
    log.write(90, "failed", error="The disk is full.")
    assert cli.main(["status", "--root", str(tmp_path)]) == 1
    assert "The disk is full." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--root", "nowhere"], "no run has begun there"),
        (["--root", ".", "--every", "0"], "--every must be > 0"),
        (["--root", ".", "--stalled-after", "-1"], "--stalled-after must be > 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("status", "watch"):
        assert cli.main([command, *words]) == 2
        shown = capsys.readouterr().err
        assert sentence in shown
        assert len(shown.splitlines()) == 1


def test_the_page_has_curves_tables_and_no_script(log: Log) -> None:
    page = render_watch_page(read_run(log.folder, now=at(75)), every_s=5)
    assert '<meta http-equiv="refresh" content="5">' in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="', page), "nothing is loaded"
    assert page.count("<polyline") >= 9
    for words in ("worst site", "mean over sites", "segmenter 2", "&lt;script&gt;", "2.50", "0.500 (B)"):
        assert words in page
    log.write(80, "failed", error="Only 1 of 2 sites & <none>.")
    page = render_watch_page(read_run(log.folder, now=at(81)), every_s=5)
    assert 'content="30"' in page
    assert "Only 1 of 2 sites &amp; &lt;none&gt;." in page


def test_many_sites_are_quiet_lines_and_the_worst_one_stands_out(tmp_path: Path) -> None:
    log = Log(tmp_path)
    names = [f"site{index:02d}" for index in range(20)]
    log.write(0, "started", run_id="x", resumed=False, rounds_done={})
    log.write(1, "preflight_passed", sites=names, dataset="d")
    for number in (1, 2):
        log.round_start(10 * number, number)
        for name in names:
            values = {"phase": "segmenter", "round": number, "metrics": {"dice": 0.5}, "seconds": 1.0}
            log.write(10 * number + 1, "site_trained", site=name, **values)
        log.round_end(10 * number + 5, number)
    page = render_watch_page(read_run(log.folder, now=at(40)), every_s=5)
    assert page.count('class="line quiet"') == 20
    assert page.count('class="line worst"') == 1


def test_the_server_is_for_this_machine_alone(log: Log) -> None:
    def ask(path: str, host: str = "localhost", method: str = "GET") -> tuple[int, str, str]:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(method, path, headers={"Host": f"{host}:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Security-Policy", ""), answer.read().decode()

    with page_server(lambda: render_watch_page(read_run(log.folder), every_s=5), 0) as server:
        address, port = server.server_address[:2]
        assert address == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            status, policy, page = ask("/")
            assert (status, "default-src 'none'" in policy, "segmenter round 3" in page) == (200, True, True)
            assert ask("/", method="HEAD")[2] == ""
            assert ask("/../etc/passwd")[0] == 404
            assert ask("/", host="evil.example")[0] == 421, "another page's name for 127.0.0.1"
            assert ask("/", method="POST")[0] == 501
            log.path.write_text("")
            assert ask("/")[0] == 503
            with pytest.raises(SetupError, match="Choose another --port"):
                page_server(str, port)
        finally:
            server.shutdown()
            thread.join()


def test_the_page_can_be_written_to_a_file(log: Log, tmp_path: Path) -> None:
    log.write(80, "finished", results="/r", sites_without_model=[])
    assert cli.main(["watch", "--root", str(tmp_path), "--page", str(tmp_path / "out" / "page.html")]) == 0
    assert "Federation finished" in (tmp_path / "out" / "page.html").read_text()


def test_tensorboard_reads_every_round_once_per_site_and_for_the_worst(log: Log, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from nnunet_fedharm.evaluation.watch.tensorboard import TensorBoardExport

    folder = tmp_path / "board"
    for _ in range(2):  # a second export replaces the first
        export = TensorBoardExport(folder)
        assert export.write(read_run(log.folder, now=at(75))) == 2
        assert export.write(read_run(log.folder, now=at(75))) == 0
        export.close()
    log.trained(71, "B", 3)
    log.round_end(80, 3, sites="AB")
    assert export.write(read_run(log.folder, now=at(81))) == 1
    export.close()
    board = EventAccumulator(str(folder / "aa-1"))
    board.Reload()
    worst = board.Scalars("segmenter/dice/worst site")
    assert [(entry.step, round(entry.value, 3)) for entry in worst] == [(1, 0.6), (2, 0.5), (3, 0.6)]
    assert worst[0].wall_time == (START + timedelta(seconds=30)).timestamp()
    tags = board.Tags()["scalars"]
    assert {"segmenter/dice/site A", "segmenter/dice/mean", "segmenter/epsilon/site A", "segmenter/bytes/up"} <= set(
        tags
    )


def test_times_are_said_in_the_unit_that_fits() -> None:
    assert [duration(value) for value in (12, 300, 7500, 400000, None)] == [
        "12 s",
        "5 min",
        "2 h 05 min",
        "4 days 15 h",
        "-",
    ]
