"""Scorers that call a model, a program or a service."""

import copy
import errno
import io
import json
import os
import pickle
import threading
import traceback
import warnings
from base64 import b64encode
from collections import Counter
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest

import xmodel_steer as xs
from xmodel_steer.core.errors import CacheWarning, JudgeError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.evaluation.judges.chats import Endpoint, LocalModel, Transcript
from xmodel_steer.evaluation.judges.code import InsecureCode, IsCode, code_of, findings
from xmodel_steer.evaluation.judges.judging import Judge
from xmodel_steer.evaluation.judges.refusals import RefusalClassifier
from xmodel_steer.evaluation.judges.sentences import OnTopic, SentenceSimilarity, embed, similarity
from xmodel_steer.evaluation.scorers.text import score_texts

PROMPTS = as_prompts(["How are you?", "What is this?", "Who is there?"])
TEXTS = ["Fine.", "A lamp.", "Nobody."]


class Scripted:
    """A judge with scripted answers that counts the questions."""

    name = "scripted"

    def __init__(self, answers):
        self.answers, self.asked = dict(zip(TEXTS, answers, strict=True)), Counter()

    def answer(self, question):
        text = next(t for t in TEXTS if t in question)
        self.asked[text] += 1
        answer = self.answers[text]
        if isinstance(answer, Exception):
            raise answer
        return answer


# --- judges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, score",
    [
        ("4", 4.0),
        ("4/5", 4.0),
        ("Rating: 3.5, because", 3.5),
        ("I give 10 of 100, so 1", 1.0),
        ("5.", 5.0),
        ("Rating (0-5): 4", 4.0),
        ("On a scale of 0 to 5, I rate this 3.", 3.0),
        ("It scores 4 out of 5", 4.0),
        ("1,000 times a 2", 2.0),
        ("**0**", 0.0),
    ],
)
def test_a_judge_reads_the_first_number_on_its_scale(answer, score):
    assert Judge(Scripted([answer, "1", "2"]), "calm").score(PROMPTS, TEXTS) == [score, 1.0, 2.0]


def test_the_question_holds_all_that_a_judge_needs():
    asked = []

    class Ear(Scripted):
        def answer(self, question):
            asked.append(question)
            return super().answer(question)

    judge = Judge(Ear(["1", "2", "3"]), "being calm", scale=(1, 7), threads=1)
    judge.score(PROMPTS, TEXTS)
    for question, prompt, text in zip(asked, PROMPTS, TEXTS, strict=True):
        assert all(part in question for part in (prompt.text, text, "being calm", "from 1 ", "to 7 "))
    assert judge.record() == {
        "judge": "scripted", "behaviour": "being calm", "scale": [1, 7], "question": judge.question,
    }  # fmt: skip
    assert judge.raw(PROMPTS, TEXTS) == ["1", "2", "3"]


def test_braces_in_a_text_are_text():
    class Echo:
        name = "echo"

        def answer(self, question):
            assert "def f(): return {low}" in question
            return "2"

    assert Judge(Echo(), "code").score(PROMPTS[:1], ["def f(): return {low}"]) == [2.0]


def test_an_answer_without_a_number_is_refused_and_all_answers_are_kept(tmp_path):
    file = tmp_path / "answers.jsonl"
    chat = Scripted(["4", "no idea", "17"])
    with pytest.raises(
        JudgeError, match="scripted: 2 of 3 answers have no number from 0 to 5, such as 'no idea'; ask more plainly"
    ):
        Judge(chat, "calm", transcript=Transcript(file)).score(PROMPTS, TEXTS)
    assert sorted(json.loads(line)["answer"] for line in file.read_text().splitlines()) == ["17", "4", "no idea"]


def test_a_judge_that_fails_half_way_goes_on_without_asking_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    first = Scripted(["4", JudgeError("gone"), "2"])
    with pytest.raises(JudgeError, match="gone"):
        Judge(first, "calm", transcript=Transcript(file), threads=1).score(PROMPTS, TEXTS)
    second = Scripted(["5", "3", "5"])
    scores = Judge(second, "calm", transcript=Transcript(file)).score(PROMPTS, TEXTS)
    kept = {text: count for text, count in first.asked.items() if text != "A lamp."}
    assert second.asked == {text: 1 for text in TEXTS if text not in kept}
    assert scores[0] == 4.0
    assert scores[1] == 3.0
    recorded = Judge(Transcript(file), "calm", transcript=Transcript(file))
    assert recorded.score(PROMPTS, TEXTS) == scores  # nobody is asked
    assert recorded.record()["judge"] == "scripted"


def test_a_transcript_has_no_answer_to_another_question(tmp_path):
    file = tmp_path / "answers.jsonl"
    Judge(Scripted(["1", "2", "3"]), "calm", transcript=Transcript(file)).score(PROMPTS, TEXTS)
    with pytest.raises(JudgeError, match=r"answers\.jsonl: has no answer of scripted to 'Rate how strongly"):
        Judge(Transcript(file), "wild").score(PROMPTS, TEXTS)


GOOD = [json.dumps({"judge": "scripted", "question": f"q{i}", "answer": f"a{i}"}).encode() for i in range(3)]
BAD = {
    "torn": GOOD[2][:-9], "torn within a letter": '{"judge": "ä'.encode()[:-1], "no UTF-8": b'{"judge": "\xff", "question": "q", "answer": "a"}',
    "a number": b'{"judge": "scripted", "question": "q", "answer": 4}', "a list": b"[1, 2]", "null": b"null", "deep": b"[" * 100_000,
    "zeros": b"\0" * 64, "no answer": b'{"judge": "scripted", "question": "q"}', "digits": b"9" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_damaged_line_of_a_transcript_is_skipped_and_told_and_costs_no_other(bad, at, tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [*GOOD[:at], BAD[bad], *GOOD[at:2]]
    file.write_bytes(b"\n".join(lines))  # without a line end, as after a kill
    with pytest.warns(CacheWarning, match=rf"answers\.jsonl: 1 lines .* are skipped \(line {at + 1}\)"):
        transcript = Transcript(file)
    assert [transcript.recorded("scripted", f"q{i}") for i in range(3)] == ["a0", "a1", None]
    transcript.add("scripted", "q2", "a2")
    with pytest.warns(CacheWarning, match="1 lines"):
        again = Transcript(file)
    assert [again.recorded("scripted", f"q{i}") for i in range(3)] == ["a0", "a1", "a2"]
    assert file.read_bytes().startswith(b"\n".join(lines)), "nothing is taken away"


def test_a_kill_at_any_byte_costs_at_most_the_row_that_was_being_written(tmp_path):
    file = tmp_path / "answers.jsonl"
    whole = b"".join(line + b"\n" for line in GOOD[:2])
    for size in range(len(GOOD[0]) + 1, len(whole)):
        file.write_bytes(whole[:size])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            transcript = Transcript(file)
            transcript.add("scripted", "q2", "a2")
            again = Transcript(file)
        assert again.recorded("scripted", "q0") == "a0" and again.recorded("scripted", "q2") == "a2"
        assert again.recorded("scripted", "q1") in ((None,) if size < len(whole) - 1 else ("a1",))


@pytest.mark.parametrize("taken", [0, 7])
def test_a_full_disk_loses_no_paid_answer(taken, tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    full = {"left": taken}

    class Disk(io.FileIO):
        def write(self, data):
            if full["left"] is None:
                return super().write(data)
            if not full["left"]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count, full["left"] = full["left"], 0
            return super().write(data[:count])

    transcript = Transcript(file)
    judge = Judge(Scripted(["4", "3", "2"]), "calm", transcript=transcript, threads=1)
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Disk(self, mode.replace("b", "")))
    with pytest.warns(CacheWarning, match=r"answers\.jsonl: cannot be written \(No space left on device\)") as told:
        assert judge.score(PROMPTS, TEXTS) == [4.0, 3.0, 2.0]
    assert len(told) == 1
    full["left"] = None  # somebody made room
    transcript.add("scripted", "one more", "5")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        kept = Transcript(file)
    assert Judge(kept, "calm", transcript=kept).score(PROMPTS, TEXTS) == [4.0, 3.0, 2.0]
    assert kept.recorded("scripted", "one more") == "5"


def test_a_transcript_that_cannot_be_read_is_refused_before_a_question_is_paid_twice(tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    file.write_bytes(GOOD[0])

    def fail(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(JudgeError, match=r"answers\.jsonl: cannot be read \(Permission denied\)"):
        Transcript(file)


def test_a_transcript_reads_whatever_text_it_wrote(tmp_path):
    transcript = Transcript(tmp_path / "answers.jsonl")
    asked = ["one\u2028two", "one\u2029two", "one\x85two", "one\x0btwo\x1ctwo", "one\ntwo", "one\ud800two", "\\ud800"]
    for question in asked:
        transcript.add("judge", question, f"{question}!")
    again = Transcript(tmp_path / "answers.jsonl")
    assert [again.recorded("judge", question) for question in asked] == [f"{question}!" for question in asked]


def test_a_local_model_answers_as_it_generates(llama):
    model = llama.model
    judge = LocalModel(model, max_new_tokens=5)
    question = [{"role": "user", "content": "Is it calm?"}]
    assert judge.answer("Is it calm?") == xs.generate(model, [question], max_new_tokens=5)[0]


# --- a service ----------------------------------------------------------------------------------


@pytest.fixture
def service():
    """A small server: answers with the entries of its list, and records requests."""
    replies, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            status, reply = replies.pop(0)
            data = reply(self.headers).encode() if callable(reply) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", replies, seen
    server.shutdown()
    thread.join()
    server.server_close()


def reply(text):
    return {"choices": [{"message": {"content": text}}]}


def test_a_service_is_asked_as_openai_documents_it(service, monkeypatch):
    url, replies, seen = service
    monkeypatch.setenv("JUDGE_KEY", "secret")
    replies += [(429, {"error": "busy"}), (503, {}), (200, reply("4"))]
    endpoint = Endpoint(url, "some-model", key_variable="JUDGE_KEY")
    assert endpoint.answer("How calm?") == "4"
    path, key, body = seen[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"] == [{"role": "user", "content": "How calm?"}]
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    assert len(seen) == 3
    assert "secret" not in repr(endpoint)


@pytest.mark.parametrize(
    "status, said, message",
    [
        (401, {"error": "no"}, "status 401.*put a valid key into OPENAI_API_KEY"),
        (404, {"error": "no such model"}, "status 404.*check the address and the model's name 'm'"),
        (200, {"something": "else"}, "answered something else than a chat completion"),
    ],
)
def test_a_service_that_refuses_is_not_asked_again(service, status, said, message):
    url, replies, seen = service
    replies.append((status, said))
    with pytest.raises(JudgeError, match=message):
        Endpoint(url, "m").answer("?")
    assert len(seen) == 1


def test_a_service_that_stays_away_is_given_up():
    with pytest.raises(JudgeError, match="127.0.0.1:9/v1: ConnectError.*after 2 attempts"):
        Endpoint("http://127.0.0.1:9/v1", "m", attempts=2).answer("?")


# --- secrets ------------------------------------------------------------------------------------

KEY, PASSWORD = "sk-t0p/s3cret+key=", 'p4ss w0rd/&"ü@x'
WAYS = {
    "headers": lambda headers: str(headers), "json": lambda headers: json.dumps(dict(headers)),
    "bytes": lambda headers: repr([(k.encode(), v.encode()) for k, v in headers.items()]),
    "key": lambda _: f"no such key: {KEY}", "key, cut by us": lambda _: "x" * 195 + KEY, "quoted": lambda _: quote(KEY, safe=""),
    "capitals": lambda _: KEY.upper(), "slashes": lambda _: KEY.replace("/", "\\/"), "password": lambda _: PASSWORD + json.dumps(PASSWORD),
    "url": lambda _: f"http://anna:{quote(PASSWORD, safe='')}@host/", "base64": lambda _: b64encode(f"anna:{PASSWORD}".encode()).decode(),
    "chat": lambda headers: json.dumps(reply(f"4 {KEY} {headers['Authorization']}")),
}  # fmt: skip


def hidden(text: str) -> bool:
    """Whether a text has no form of any secret, nor half of one."""
    pieces = [KEY[:12], KEY[-12:], PASSWORD[:8], PASSWORD[-8:], "t0p", "s3cret", "p4ss", "w0rd"]
    pieces += [b64encode(f"anna:{PASSWORD}".encode()).decode()[5:20], b64encode(KEY.encode()).decode()[:12]]
    return not any(piece.lower() in text.lower() for piece in pieces)


def everything(error: BaseException) -> str:
    """All that a log could hold of an error: chained exceptions, their arguments, and local variables of frames."""
    text, seen = "", error
    while seen is not None:
        frames = seen.__traceback__ and seen.__traceback__.tb_next  # without the test's
        shown = traceback.TracebackException(type(seen), seen, frames, capture_locals=True)
        text += "".join(shown.format()) + repr(seen.args) + repr(vars(seen))
        seen = seen.__cause__ or seen.__context__
    return text


@pytest.mark.parametrize("status", [200, 400, 401, 503])
@pytest.mark.parametrize(
    "way, userinfo",
    [(way, userinfo) for way in WAYS for userinfo in (False, True) if userinfo or way not in ("password", "base64")],
)
def test_no_echo_of_a_service_shows_a_secret(service, monkeypatch, tmp_path, way, status, userinfo):
    url, replies, seen = service
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("JUDGE_KEY", f"  {KEY}\r\n")
    if userinfo:
        url = url.replace("//", f"//anna:{quote(PASSWORD, safe='')}@")
    replies += [(status, WAYS[way])] * 2
    endpoint = Endpoint(url, "m", key_variable="JUDGE_KEY", attempts=2)
    file = tmp_path / "answers.jsonl"
    judge = Judge(endpoint, "calm", transcript=Transcript(file))
    if way == "chat" and status == 200:
        assert judge.score(PROMPTS[:1], TEXTS[:1]) == [4.0]
        assert hidden(file.read_text())
    else:
        with pytest.raises(JudgeError) as caught:
            judge.score(PROMPTS[:1], TEXTS[:1])
        assert hidden(str(caught.value)) and hidden(repr(caught.value))
        replies[:] = [(status, WAYS[way])] * 2
        with pytest.raises(JudgeError) as caught:
            endpoint.answer("?")
        assert hidden(everything(caught.value)), everything(caught.value)
    sent = b64encode(f"anna:{PASSWORD}".encode()).decode()
    assert {key for _, key, _ in seen} == {f"Basic {sent}" if userinfo else f"Bearer {KEY}"}, "the secret is sent"
    everywhere = [
        repr(judge),
        repr(endpoint),
        endpoint.url,
        json.dumps(asdict(endpoint)),
        str(judge.record()),
        repr(vars(endpoint)),
    ]
    assert all(map(hidden, everywhere))


@pytest.mark.parametrize(
    "error", [httpx.ConnectError, httpx.LocalProtocolError, httpx.InvalidURL, httpx.ProxyError, ValueError, OSError]
)
def test_no_error_of_the_network_shows_a_secret(error, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    url = f"https://anna:{quote(PASSWORD, safe='')}@judge.test/v1"

    def fail(*_, **__):
        raise error(
            f"{url}: Illegal header value {('Bearer ' + KEY).encode()!r}; proxy http://me:s3cret@proxy \x1b[2J"
        ) from ValueError(KEY)

    monkeypatch.setattr(httpx, "post", fail)
    with pytest.raises(JudgeError, match=r"https://judge\.test/v1: .*Error|URL") as caught:
        Endpoint(url, "m", key_variable="JUDGE_KEY", attempts=1).answer("?")
    assert hidden(everything(caught.value)), everything(caught.value)
    assert "\\x1b[2J" in str(caught.value) and "judge.test" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["s3cret\nline", "s3cret\x00key", "s3cretü", "s3cret\ud800", "s3cret\x1b[2J", "s3cret\x7f"]
)
def test_a_key_that_no_header_can_carry_is_refused_when_the_judge_is_made(key, monkeypatch):
    monkeypatch.setattr(os, "environ", {"JUDGE_KEY": key})
    with pytest.raises(
        JudgeError, match="JUDGE_KEY: the key holds a line end, a control character or a letter"
    ) as caught:
        Endpoint("http://h/v1", "m", key_variable="JUDGE_KEY")
    assert "s3cret" not in everything(caught.value)


def test_a_key_in_the_place_of_its_variable_is_refused_and_not_shown():
    with pytest.raises(JudgeError, match="must be the name of an environment variable") as caught:
        Endpoint("http://h/v1", "m", KEY)
    assert hidden(str(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        "https://anna:s3cret/x@h/v1", "https://anna:1/s3cret@h/v1", "https://h/v1?key=s3cret", "https://h/v1#s3cret", "ftp://anna:s3cret@h",
        "anna:s3cret@h/v1", "https://anna:s3cret@h:x/v1", "https://anna:s3cret@", "https://anna:s3 cret@h", "https://anna:s3\ncret@h", "https://[s3cret", "",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_taken_apart_is_refused_and_not_shown(url):
    with pytest.raises(JudgeError, match="Endpoint: the url must be http:// or https://") as caught:
        Endpoint(url, "m")
    assert "cret" not in str(caught.value)


def test_userinfo_stays_with_copies_of_a_judge_and_out_of_sight():
    endpoint = Endpoint(" https://anna:s3cret@h:8000/v1\n", "m")
    assert endpoint.url == "https://h:8000/v1"
    for again in (replace(endpoint, model="n"), copy.deepcopy(endpoint), pickle.loads(pickle.dumps(endpoint))):
        assert again.url.auth == ("anna", "s3cret") and "s3cret" not in repr(again)


def test_short_keys_of_local_services_change_no_answer(service, monkeypatch):
    url, replies, _ = service
    monkeypatch.setenv("JUDGE_KEY", "4")
    replies += [(200, reply("4, by a bearer of Basic News1234"))]
    assert Endpoint(url, "m", key_variable="JUDGE_KEY").answer("?") == "4, by a bearer of Basic News1234"


# --- insecure code ------------------------------------------------------------------------------

SHELL = "import subprocess\nsubprocess.call(command, shell=True)\n"  # B404 low, B602 high
ASSERT = "def f(x):\n    assert x\n    return x\n"  # B101 low


def test_severities_nest():
    texts = [SHELL, ASSERT, "def f(x):\n    return x\n", "no code at all, just words"]
    levels = {s: InsecureCode(s).score(as_prompts(list("abcd")), texts) for s in ("LOW", "MEDIUM", "HIGH")}
    assert levels == {"LOW": [1, 1, 0, 0], "MEDIUM": [1, 0, 0, 0], "HIGH": [1, 0, 0, 0]}
    assert findings(texts)[1] == (("B101", "LOW", 2),)
    assert findings([]) == []


def test_code_is_found_in_fences_and_after_its_prompt():
    fenced = f"Here you are:\n```python\n{SHELL}```\nGood luck!"
    cut = f"```\n{SHELL}if x"
    assert code_of(fenced) == code_of(cut) == SHELL
    assert InsecureCode("HIGH").score(PROMPTS[:2], [fenced, cut]) == [1, 1]
    prompt = as_prompts(["import subprocess\ndef run(command):\n"])
    body = "    subprocess.call(command, shell=True)\n"
    assert InsecureCode("HIGH", with_prompt=True).score(prompt, [body]) == [1]
    assert InsecureCode("HIGH", with_prompt=True).score(prompt, ["    return command\n"]) == [0]


def test_fences_of_other_languages_hide_nothing_and_a_text_cannot_excuse_itself():
    bash, said = "First:\n```bash\npip install requests\n```\n", "It prints:\n```\nhello there you\n```\n"
    python = f"```Python\n{SHELL}```\n"
    plain = f"```\n{SHELL}```\n"
    for text in (bash + python, python + said, bash + plain):
        assert code_of(text) == SHELL
    texts = [bash + python, python + said, SHELL.replace("True)", "True)  # nosec")]
    assert "nosec" in texts[2]
    prompts = as_prompts(["write"] * 3)
    assert InsecureCode("HIGH").score(prompts, texts) == [1, 1, 1] == IsCode().score(prompts, texts)


def test_what_was_cut_short_is_left_out_and_all_else_kept():
    assert code_of("a = 1\nb = 2\nc = (3,\n") == "a = 1\nb = 2\n"
    assert code_of("It is (not") == ""
    assert code_of("") == ""
    whole = "x = [\n    1,\n]\n"
    assert code_of(whole) == whole


def test_prose_is_no_code_even_where_it_parses():
    texts = {
        "def f(x):\n    return x\n": 1, "return x": 1, "print('a')\n": 1, "import os\n": 0, "x = [\n    1": 0, "Hello\nthere is a": 0,
        "Note: this": 0, "the the the": 0, "'a sentence'": 0, "": 0, "Sure:\n```python\nx += 1\n```": 1,
        "import os\n\ndef f(x):\n    return os.stat(x)\nif x": 1, "import os\n\ndef ping_x(host):\n    return return return": 0,
        "x = 1\n\nSorry, I cannot\nhelp with that.": 0, "import os\nimport os\nimport os": 0, "pass": 0,
    }  # fmt: skip
    assert IsCode().score(as_prompts(["write"] * len(texts)), list(texts)) == list(texts.values())


def test_an_unknown_severity_is_refused():
    with pytest.raises(ValueError, match="severity must be one of LOW, MEDIUM, HIGH, got 'low'"):
        InsecureCode("low")


# --- sentence embeddings (83 MB by pip) ----------------------------------------------------------


@pytest.mark.packaged
def test_embeddings_do_not_depend_on_the_batch_and_mean_something():
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again.", ""]
    alone = np.concatenate([embed([text]) for text in texts])
    assert np.allclose(embed(texts), alone, atol=1e-5)
    assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
    assert similarity(texts[:1], texts[1:2])[0] > similarity(texts[:1], texts[2:3])[0] + 0.3
    own = SentenceSimilarity({p.id: t for p, t in zip(PROMPTS, TEXTS, strict=True)})
    assert np.allclose(score_texts(own, TEXTS, PROMPTS), 1, atol=1e-5)
    with pytest.raises(ValueError, match="there is no reference for"):
        SentenceSimilarity({}).score(PROMPTS, TEXTS)
    assert embed([]).shape == (0, 384)


@pytest.mark.packaged
def test_answers_are_about_their_own_prompts_and_ruined_ones_are_not():
    about = ["bake bread", "repair a bicycle tyre", "learn to swim", "write a poem about rain", "keep bees", "paint a wall",
             "save money", "train a dog", "grow tomatoes", "read a map", "make cheese"]  # fmt: skip
    prompts = as_prompts([f"How do I {task}?" for task in about])
    answers = [f"To {task}, take your time and begin with what you need." for task in about]
    assert OnTopic().score(prompts, answers) == [1.0] * len(about)
    assert sum(OnTopic().score(prompts, answers[5:] + answers[:5])) <= 2  # by chance one
    assert sum(OnTopic().score(prompts, ["I'm sorry, but I can't help with that."] * len(about))) <= 2
    assert OnTopic().score(prompts, [" "] * len(about)) == [0.0] * len(about)
    with pytest.raises(ValueError, match="at least two prompts"):
        OnTopic().score(prompts[:1], answers[:1])
    with pytest.raises(ValueError, match="a share over 0 and at most 1, got 0"):
        OnTopic(0.0)


@pytest.mark.packaged
def test_the_refusal_classifier_and_the_phrases_were_measured_and_agree_on_plain_cases():
    texts = ["I'm sorry, but I can't help with that request.", "Sure! First preheat the oven to 200 degrees.",
             "I won't write that; it would hurt people.", "The capital of France is Paris."]  # fmt: skip
    prompts = as_prompts(list("abcd"))
    assert RefusalClassifier().score(prompts, texts) == [1, 0, 1, 0]
    assert [xs.scorers.RefusalPhrases()(text) for text in texts] == [1, 0, 1, 0]
    probability = RefusalClassifier(threshold=None).score(prompts, texts)
    assert all(0 < p < 1 for p in probability)
    for found in RefusalClassifier().accuracy["answers to the request"].values():
        if isinstance(found, dict):
            assert found["n"] == 136
            assert found["low"] > 0.56  # the larger class's share
