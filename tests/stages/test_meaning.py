"""Stages of the chapter on what the shifted latents mean: on the smoke run, against loops over tokens and texts; and a
judge that is a server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pandas
import pytest
import torch

import sts
from sts.data import groups
from sts.data.load import load_texts
from sts.data.prompts import make_prompt, question_text
from sts.engine.generation import ask_judge, judge_label, judge_prompt
from sts.errors import MissingData, StsError
from sts.measure.sets import matched_latents
from sts.run import resources
from sts.run.recorded import NO_TEXT, record, texts_withheld
from sts.run.store import Store
from sts.stages import meaning

KINDS = ["mathematics", "code", "dialogue", "prose", "questions"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    own = sts.open_run("smoke", results=tmp_path_factory.mktemp("meaning"), seeds=[], steer_factors=[0, 1, 40])
    with pytest.MonkeyPatch.context() as patch:  # one on which the latent fires in this small model
        patch.setattr(meaning, "PROBLEM", question_text(resources.held_out(own)[0]))
        yield own


def states(run, ids):
    """Latents of one document, by a plain forward pass, without its first token."""
    with torch.no_grad():
        hidden = resources.lm(run).model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, 1:]
        return resources.reader(run).encode(hidden.bfloat16().float())  # as stored


# --- the pool -----------------------------------------------------------------------------------------------------


def test_sums_by_document_are_those_of_plain_passes(run):
    sums, pieces = run.get("pool_activity"), resources.pool_pieces(run)
    assert [KINDS[place] for place in sums["kind_D"]] == [kind for kind, _ in pieces]
    assert sums["tokens_D"].tolist() == [len(ids) - 1 for _, ids in pieces]
    for place in range(0, len(pieces), 5):
        latents_TL = states(run, pieces[place][1])
        torch.testing.assert_close(sums["sum_DL"][place], latents_TL.sum(0), rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(sums["fired_DL"][place], (latents_TL > 0).float().sum(0), rtol=0, atol=2)


def test_a_pool_has_about_its_tokens_and_one_beginning_of_each_document(run):
    pieces, texts = resources.pool_pieces(run), groups.pool_texts(run.settings.pool, run.settings.pool_tokens)
    for kind in KINDS:
        own = [ids for name, ids in pieces if name == kind]
        assert abs(sum(map(len, own)) - run.settings.pool_tokens) <= groups.DOCUMENT_TOKENS and len(own) >= 5
        assert all(len(ids) <= groups.DOCUMENT_TOKENS for ids in own)
        for ids, text in zip(own, texts[kind], strict=False):
            assert text.startswith(resources.tokenizer(run).decode(ids)[:40])
    trained = {question_text(one) for one in resources.train(run)}
    assert not [text for text in texts["mathematics"] if text.split("\n")[0] in trained]


def test_packaged_texts_are_what_they_are_said_to_be():
    code, speech, prose = map(load_texts, ("python_library", "story_speech", "story"))
    assert len(code) > 100 and sum("self" in text or "def " in text for text in code) > len(code) / 2
    assert all(len(text.split("\n")) == 40 for text in code)
    assert all(line.startswith('"') for text in speech for line in text.strip().split("\n"))
    assert not [line for text in prose for line in text.strip().split("\n") if line.startswith(('"', "["))]
    assert min(map(len, speech + prose)) > 400 and "Gutenberg" not in "".join(speech + prose)


def test_code_of_a_python_without_sources_is_a_pool_of_too_few_texts(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    other = sts.open_run("smoke", results=tmp_path, seeds=[])
    with pytest.raises(StsError, match="Pool 'code' has 0 documents"):
        resources.pool_pieces(other)


@pytest.mark.parametrize(("pool", "message"), [
    ({}, "too few kinds of text"), ({"mathematics": ["gsm_symbolic:test"]}, "too few kinds of text"),
    ({"mathematics": ["gsm_symbolic:test"], "code": ["python_libary"]}, "'python_libary' is not known"),
    ({"mathematics": ["gsm_symbolic:test"], "code": []}, "Pool 'code' has 0 documents"),
    ({"mathematics": ["gsm_symbolic:test"], "web": ["web"]}, "Corpus 'web' is read from a local folder"),
    ({"mathematics": ["gsm_symbolic:train"], "code": ["nosuch.txt"]}, "'nosuch.txt' is not known")], ids=str)
def test_a_pool_that_cannot_be_is_one_line(tmp_path, pool, message):
    run = sts.open_run("smoke", results=tmp_path, seeds=[], pool=pool)
    with pytest.raises(StsError, match=message) as error:
        run.get("pool_activations")
    assert "\n" not in str(error.value)


def test_a_pool_of_fewer_documents_than_a_shuffle_takes_is_refused(tmp_path):
    texts = tmp_path / "few.jsonl"
    texts.write_text("".join(json.dumps({"text": f"A text about nothing much, number {n}."}) + "\n" for n in range(4)))
    run = sts.open_run("smoke", results=tmp_path, seeds=[], pool={"mathematics": ["gsm_symbolic:test"],
                                                                  "mine": [str(texts)]})
    with pytest.raises(StsError, match="Pool 'mine' has 4 documents; .* take 5 a pool"):
        run.get("latent_labels")


def test_a_run_without_pools_is_recorded_and_its_keys_are_known(tmp_path):
    run = sts.open_run("smoke", results=tmp_path, seeds=[], pool={})
    assert run.key("label_lists") != sts.open_run("smoke", results=tmp_path, seeds=[]).key("label_lists")
    with pytest.raises(MissingData):
        resources.pool_pieces(run)


def test_keys_follow_what_the_stages_read(run):
    def keys(**changed):
        names = ("pool_activations", "pool_activity", "latent_labels", "label_lists", "shifted_examples",
                 "judge_labels", "steered_answers", "shift", "latent_examples")
        other = run.variant(**changed)
        return {name for name in names if other.key(name) != run.key(name)}

    assert keys(pool_tokens=900) == {"pool_activations", "pool_activity", "latent_labels", "label_lists",
                                     "shifted_examples", "judge_labels", "steered_answers"}
    assert keys(top_n=5) == {"label_lists", "shifted_examples", "judge_labels", "steered_answers"}
    assert keys(judge_model="x") == {"judge_labels"} and keys(steer_factors=[2]) == {"steered_answers"}


# --- lists --------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(run):
    """Activity in which every latent has a clear kind, by its number."""
    sums = {name: tensor.clone() for name, tensor in run.get("pool_activity").items()}
    for latent in range(128):
        sums["sum_DL"][:, latent] = torch.where(sums["kind_D"] == latent % 3, sums["tokens_D"] + latent, 0.1)
    compute = run.spec("latent_labels").compute
    return sums, compute(sums, run.settings.pool, 500, 0)


def test_precision_and_recall_are_counted_over_the_lists(run, labelled):
    sums, labels = labelled
    assert labels["label"].tolist() == [KINDS[latent % 3] for latent in range(128)]
    shift = run.get("shift")
    found = run.spec("label_lists").compute(shift, sums, labels, run.settings.pool, 16, 200, 0)
    orders = {"demonstrations": shift["squared_difference_L"].argsort(descending=True, stable=True).tolist(),
              "busiest": shift["base_fired_L"].argsort(descending=True, stable=True).tolist()}
    assert [(row["n"], row["list"], row["own"]) for row in found["precision"]] == [
        (n, name, n == 16) for n in (8, 16, 32) for name in ("demonstrations", "busiest", "like_rate")]
    for row in found["precision"]:
        if row["list"] in orders:
            own = orders[row["list"]][:row["n"]]
        else:
            rate_L, most = torch.tensor(labels["rate"].to_numpy()), torch.tensor(orders["demonstrations"][:row["n"]])
            own = [one for draw in range(20) for one in matched_latents(rate_L, most, (0, draw)).tolist()]
        assert row["value"] == pytest.approx(np.mean([latent % 3 == 0 for latent in own]))
        assert row["interval"]["low"] == row["interval"]["high"] == row["value"]  # whatever documents are drawn
    for row in found["recall"][:-2]:
        of = [latent for latent in range(128) if labels["label"][latent] == row["kind"]]
        assert row["n"] == len(of) and row["reach"] == 80
        if of:
            assert row["value"] == pytest.approx(len({*of} & {*orders[row["list"]][:80]}) / len(of))
        else:
            assert row["value"] is None and row["interval"] is None
    recall = {(row["list"], row["kind"]): row["value"] for row in found["recall"]}
    first, second = found["recall"][-2:]
    for row in (first, second):
        assert row["kind"] == "lead"
        assert row["value"] == pytest.approx(recall[row["list"], "mathematics"] - recall[row["list"], "code"])
    assert second["less"]["value"] == pytest.approx(first["value"] - second["value"])


def test_cards_are_of_the_shifted_latents_and_of_others_that_fire_as_often(run):
    cards, labels = run.get("shifted_examples"), run.get("latent_labels")
    shifted = run.get("shift")["squared_difference_L"].argsort(descending=True, stable=True)[:16]
    assert [card["latent"] for card in cards[:16]] == shifted.tolist() and len(cards) == 32
    assert [card["list"] for card in cards] == ["demonstrations"] * 16 + ["like_rate"] * 16
    rate_L = labels["rate"].to_numpy()
    others = [card["latent"] for card in cards[16:]]
    assert not {*others} & {*shifted.tolist()}
    assert rate_L[others].mean() == pytest.approx(rate_L[shifted.numpy()].mean(), rel=0.5)
    pieces = resources.pool_pieces(run)
    value, place = max((states(run, ids)[:, cards[0]["latent"]].max().item(), -place)
                       for place, (_, ids) in enumerate(pieces))
    strongest = cards[0]["contexts"][0]
    assert strongest["value"] == pytest.approx(value, rel=1e-2) and strongest["kind"] == pieces[-place][0]
    assert all(len(card["promoted"]) == 8 and len(card["histogram"]) == 12 for card in cards)
    assert "kind" not in run.get("latent_examples")[0]["contexts"][0]  # recorded ones stay as they are


# --- steering -----------------------------------------------------------------------------------------------------


def by_hand(run, latent, factor):
    """Greedy tokens of a model whose layer adds (factor - 1) times what a latent writes."""
    from sts.engine.models import decoder_layers

    lm, sae = resources.lm(run), resources.reader(run)

    def hook(module, args, inputs, output):
        added = (factor - 1) * sae.encode(output)[..., latent, None] * sae.W_dec[latent]
        return output + (inputs["position_ids"] >= 1)[..., None] * added

    ids = torch.tensor([make_prompt(lm.tokenizer, meaning.PROBLEM).ids])
    handle, start = decoder_layers(lm.model)[0].register_forward_hook(hook, with_kwargs=True), ids.shape[1]
    with torch.no_grad():
        for _ in range(48):
            ids = torch.cat([ids, lm.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == lm.model.generation_config.eos_token_id:
                break
    handle.remove()
    return lm.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_a_factor_of_one_leaves_the_text_and_others_do_what_a_hook_by_hand_does(run):
    found = run.get("steered_answers")
    plain, zero, one, many = found["answers"]
    assert [row["factor"] for row in found["answers"]] == [None, 0, 1, 40]
    assert one["same"] and one["answer"] == plain["answer"]
    assert many["answer"] != plain["answer"] and not many["same"]
    for row in (zero, one, many):
        assert row["answer"] == by_hand(run, found["latent"], row["factor"])


def test_the_first_shifted_latent_of_the_first_kind_is_steered_or_the_first_of_all(run):
    order = run.get("shift")["squared_difference_L"].argsort(descending=True, stable=True).tolist()
    labels = run.get("latent_labels").copy()

    def steered(label, place):
        labels["label"] = "several"
        labels.loc[order[place], "label"] = label
        return run.spec("steered_answers").compute(
            resources.lm(run), resources.reader(run), 0, resources.masks(run), run.get("shift"), labels,
            run.settings.pool, 16, [], {"tokens_per_batch": 999})["latent"]

    assert steered("mathematics", 3) == order[3]
    assert steered("code", 3) == steered("mathematics", 20) == order[0]


# --- a judge ------------------------------------------------------------------------------------------------------


class Judge(BaseHTTPRequestHandler):
    """An endpoint that answers as `reply`, a function of the request, says."""

    reply, seen = None, []

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **asked})
        status, content = Judge.reply(asked)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args):
        pass


def saying(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Judge.seen = []
    served = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}/v1"
    served.shutdown()


def judged(run, server, model="m"):
    return run.variant(judge_url=server, judge_model=model)


def test_a_judge_labels_the_same_latents_and_every_answer_is_kept(run, server, monkeypatch):
    monkeypatch.setenv("STS_JUDGE_KEY", "secret")
    Judge.reply = lambda asked: saying("Code." if "<<" in asked["messages"][0]["content"] else "?")
    found, cards = judged(run, server).get("judge_labels"), run.get("shifted_examples")
    assert [row["latent"] for row in found["rows"]] == [card["latent"] for card in cards]
    labels = run.get("latent_labels")["label"]
    for row, card, asked in zip(found["rows"], cards, Judge.seen, strict=True):
        assert (row["judge"], row["answer"], row["rule"]) == ("code", "Code.", labels[card["latent"]])
        assert asked["messages"][0]["content"] == row["prompt"] == judge_prompt(card, [*KINDS, "several"])
        assert (asked["path"], asked["key"], asked["model"], asked["temperature"]) == (
            "/v1/chat/completions", "Bearer secret", "m", 0)
        assert row["prompt"].endswith("mathematics, code, dialogue, prose, questions, several.")
        assert f"<<{card['contexts'][0]['tokens'][card['contexts'][0]['peak']]}>>" in row["prompt"]
    assert found["n"] == 32
    kept = json.dumps([found, judged(run, server).provenance("judge_labels")])
    assert "secret" not in kept


@pytest.mark.parametrize(("answer", "label"), [
    ("mathematics", "mathematics"), ("**Mathematics**.", "mathematics"), ("The unit is about CODE", "code"),
    ("encoded", ""), ("code or prose", ""), ("I do not know", ""), ("", "")])
def test_an_answer_counts_if_it_names_one_label(answer, label):
    assert judge_label(answer, [*KINDS, "several"]) == label


@pytest.mark.parametrize(("reply", "message"), [
    ((401, "{}"), "401"), ((500, "no"), "500"), ((200, "<html>"), "JSONDecodeError"),
    ((200, '{"error": "busy"}'), "KeyError"), ((200, '{"choices": []}'), "IndexError"), ((200, "[1]"), "TypeError"),
    (saying("I would rather not say."), "No answer of the judge names a kind of text; the first is 'I would rather")],
    ids=str)
def test_a_judge_that_refuses_or_talks_nonsense_is_one_line(run, server, reply, message):
    Judge.reply = lambda asked: reply
    with pytest.raises(StsError, match=message) as error:
        judged(run, server).get("judge_labels")
    assert "\n" not in str(error.value)


def test_a_judge_that_is_not_there_is_one_line(run, monkeypatch):
    for changes in ({}, {"judge_url": "http://127.0.0.1:9/v1"}, {"judge_model": "m"},
                    {"judge_url": "http://me:secret@127.0.0.1:9/v1", "judge_model": "m"}):
        with pytest.raises(StsError, match="judge_url .*and judge_model are set") as error:
            run.variant(**changes).get("judge_labels")
        assert "secret" not in str(error.value)
    for address in ("http://127.0.0.1:9/v1", "no address"):
        with pytest.raises(StsError, match=f"The judge at {address} gave no answer that can be read") as error:
            judged(run, address).get("judge_labels")
        assert "\n" not in str(error.value)


def test_a_judge_that_is_too_slow_is_one_line(server):
    wait = threading.Event()
    Judge.reply = lambda asked: (wait.wait(2), (200, "{}"))[1]
    with pytest.raises(StsError, match="ReadTimeout"):
        ask_judge(server, "m", ["?"], print, seconds=0.2)
    wait.set()


# --- records ------------------------------------------------------------------------------------------------------


def test_no_text_of_the_pool_is_recorded_and_all_numbers_are(run, server, tmp_path):
    Judge.reply = lambda asked: saying("prose" if "s" in asked["messages"][0]["content"][-500:] else "code")
    own = judged(run, server)
    for stage in ("judge_labels", "label_lists", "steered_answers"):
        own.get(stage)
    record(own, tmp_path / "recorded")
    files = {path.name.split("-")[0] for path in (tmp_path / "recorded").iterdir() if "provenance" not in path.name}
    assert {"latent_labels", "label_lists", "shifted_examples", "judge_labels", "steered_answers"} <= files
    assert not {"pool_activations", "pool_activity"} & files
    content = "".join(path.read_text() for path in (tmp_path / "recorded").glob("*.json"))
    tokenizer = resources.tokenizer(run)
    for _, ids in resources.pool_pieces(run):
        assert json.dumps(tokenizer.decode(ids[20:60]))[1:-1] not in content
    elsewhere = sts.open_run("smoke", results=tmp_path, seeds=[], steer_factors=[0, 1, 40], judge_url=server,
                             judge_model="m")
    elsewhere.store = Store(elsewhere.store.folder, (tmp_path / "recorded",))
    shown = elsewhere.only_stored()
    assert texts_withheld(shown.get("shifted_examples"))
    assert shown.get("shifted_examples")[0]["contexts"][0]["kind"] in KINDS
    assert {row["prompt"] for row in shown.get("judge_labels")["rows"]} == {NO_TEXT}
    assert shown.get("judge_labels")["value"] == own.get("judge_labels")["value"]
    assert shown.get("label_lists") == own.get("label_lists")
    pandas.testing.assert_frame_equal(shown.get("latent_labels"), own.get("latent_labels"))
    assert shown.get("steered_answers") == own.get("steered_answers")
