"""What Slurm says about a job."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.errors import ScaleprogError
from scaleprog.ranks.stop import deadline
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.slurm_queue import Job
from tests.unit.fake_slurm import FakeSlurm


def test_a_job_as_scontrol_shows_it(fake: FakeSlurm) -> None:
    assert slurm_queue.find("7") == Job("7", "scaleprog-a b", "RUNNING", nodes="node[0-1]")
    fake.show(state="SIGNALING", restarts=2, preempt="1795468837", end="1795468900")
    job = slurm_queue.find("7")
    assert job is not None
    assert (job.state, job.restarts, job.preempted, job.end, job.over) == ("RUNNING", 2, True, 1795468900.0, False)
    for code, known in (("2:0", 2), ("0:9", 137)):
        fake.show(state="FAILED", code=code)
        job = slurm_queue.find("7")
        assert job is not None
        assert (job.over, job.exit_code) == (True, known)


def test_a_job_that_slurm_has_forgotten(fake: FakeSlurm) -> None:
    fake.command("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    fake.command("sacct", "echo 'scaleprog-a b|CANCELLED by 0|0:15|node0'")
    assert slurm_queue.find("7") == Job("7", "scaleprog-a b", "CANCELLED", nodes="node0", exit_code=143)
    fake.command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm_queue.find("7") is None


def test_no_answer(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(slurm_queue.NoAnswer, match="Unable to contact slurm controller"):
        slurm_queue.find("7")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm_queue.NoAnswer, match="scontrol not found"):
        slurm_queue.find("7")


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node0", ["node0"]),
        ("node[0-1]", ["node0", "node1"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("a-b[1-2]-c,x.y", ["a-b1-c", "a-b2-c", "x.y"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_hosts(nodelist: str, names: list[str]) -> None:
    assert slurm_queue.hosts(nodelist) == names


GARBLED = {
    "not UTF-8": r"printf '\377\376\033[2J\n'", "nothing": "true", "an empty line": "echo",
    "cut off": "printf 'JobId=7 JobState=RUN'", "no state": "echo 'JobId=7 JobName=x UserId=y'",
    "another state": "echo 'JobId=7 JobState=running;rm'", "endless": r"yes JobId=7 | tr -d '\n'",
    "no number of restarts": "echo 'JobId=7 JobState=RUNNING Restarts=many'", "both endless": "yes & yes >&2",
    "silence": "sleep 1000", "silence of another": "sleep 1000 & disown; exit 1",
}  # fmt: skip


@pytest.mark.parametrize("answer", GARBLED.values(), ids=GARBLED)
def test_answers_that_are_none(answer: str, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_queue, "ANSWER_SECONDS", 1.0)
    for command in ("scontrol", "sacct", "scancel"):
        fake.command(command, answer)
    with pytest.raises(slurm_queue.NoAnswer) as told:
        slurm_queue.find("7")
    assert str(told.value).isprintable()
    fake.command("scontrol", "echo 'Invalid job id specified' >&2; exit 1")
    assert slurm_queue.find("7") is None


def test_a_command_that_leaves_something_behind_is_heard(fake: FakeSlurm) -> None:
    fake.command("scontrol", f"cat {fake.folder}/shown; sleep 1000 & disown")
    job = slurm_queue.find("7")
    assert job is not None
    assert job.state == "RUNNING"


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"end": "9" * 400}, {"end": None}), ({"end": "-5"}, {"end": None}), ({"end": "²"}, {"end": None}),
        ({"code": "x:y"}, {"exit_code": 0}), ({"code": "9" * 5000}, {"exit_code": 0}), ({"code": ""}, {"exit_code": 0}),
        ({"preempt": "soon"}, {"preempted": False}), ({"reason": "\x1b[2J"}, {"state": "RUNNING"}),
    ],
)  # fmt: skip
def test_values_that_are_none(fields: dict[str, str], known: dict[str, object], fake: FakeSlurm) -> None:
    fake.show(**fields)
    job = slurm_queue.find("7")
    assert known.items() <= vars(job).items()


@pytest.mark.parametrize("job", ["--all", "-u root", "7;id", "", "7 8", "9" * 40, "７", "7\n"])
def test_nothing_but_an_id_reaches_slurm(job: str, fake: FakeSlurm) -> None:
    for ask in (slurm_queue.find, slurm_queue.cancel, slurm_queue.requeue):
        with pytest.raises(slurm_queue.NoAnswer, match="is not the number of a Slurm job"):
            ask(job)
    assert [fake.calls(name) for name in ("scontrol", "scancel", "sacct")] == [[], [], []]


@pytest.mark.parametrize(
    "nodelist",
    ["", "n[0-99999999999]", "n[1-9]" * 40, "n[a-b]", "n[", "n[]", "n[1--2]", "n[9-1]", "[" * 10_000, "n[1-2" * 5000,
     f"n[{'0' * 5000}-1]", "n[²-3]"],
)  # fmt: skip
def test_lists_that_are_none(nodelist: str) -> None:
    with pytest.raises(ScaleprogError, match="is not a list of nodes"):
        slurm_queue.hosts(nodelist)


@given(st.text(max_size=30) | st.text(st.sampled_from("n[]-,0123456789"), max_size=20))
def test_any_list_is_one_or_said_to_be_none(nodelist: str) -> None:
    try:
        names = slurm_queue.hosts(nodelist)
    except ScaleprogError as error:
        assert "is not a list of nodes" in str(error)  # noqa: PT017
    else:
        assert 1 <= len(names) <= slurm_queue.MOST_HOSTS


@pytest.mark.parametrize("end", ["²", "9" * 400, "-1", "nan", "", "soon"])
def test_a_time_limit_that_is_none(end: str) -> None:
    assert deadline({"SLURM_JOB_END_TIME": end}) is None


GONE = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
SILENT = "echo 'Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("job", "told", "answer", "end"),
    [
        (None, 600, {"end": "900"}, None),
        ("7", 600, {"end": "900"}, 900),  # the limit was raised
        ("7", None, {"end": "900"}, 900),  # salloc before 23.02 tells no end
        ("7", -600, {"end": "-600"}, None),
        ("7", 600, {"end": "600", "state": "CANCELLED"}, None),  # the shell outlived its allocation
        ("7", 600, GONE, None),
        ("7", 600, SILENT, 600),
        ("7", -600, SILENT, None),
        ("-o", -600, {}, None),
    ],
    ids=map(str, range(9)),  # every process that collects tests must name them alike
)
def test_the_time_limit_of_an_allocation_that_is_over_ends_nothing(
    job: str | None, told: int | None, answer: dict[str, str] | str, end: int | None, fake: FakeSlurm
) -> None:
    """Times in seconds from now."""
    now = int(time.time())
    if isinstance(answer, str):
        fake.command("scontrol", answer)
    else:
        fake.show(**answer | ({"end": now + int(answer["end"])} if "end" in answer else {}))
    fake.command("sacct", "exit 1")
    found = slurm_queue.end_of_job(job, None if told is None else now + told)
    assert found == (None if end is None else now + end)
