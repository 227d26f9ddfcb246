import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import adapter
import audio
import benchmark
import documents
import evaluate
import listen
import manner
import pretrain
import prosody
import runs
import toy
import weights
from chat import Chat, parts_of, take
from conftest import ROOT, call, first_on_path, shrink, six_tokens, speedrun_commands
from merge import Merge
from vocab import Vocab


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The out folder of a whole shrunken speedrun_manner.sh."""
    out, patch = tmp_path_factory.mktemp("manner"), pytest.MonkeyPatch()
    patch.setattr("evaluate.generate", six_tokens)
    for words in speedrun_commands(out, "speedrun_manner.sh"):
        call(shrink(words), patch)
    patch.undo()
    return out


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_caption_says_how_a_line_is_said_and_answers_are_its_words():
    said = manner.Manner("woman", "high", "fast", 2)
    line = "anna goes to peru"
    assert manner.Manner("man", "low", "slow", None).caption(line) == "a low slow man"
    said = said._replace(stress=3)
    assert said.caption(line) == "a high fast woman stresses peru"
    assert [said.answer(relation, line) for relation in said.relations()] == [
        "woman", "high", "fast", "peru",
    ]
    assert said.told("pace", line) == "the pace of it is fast"
    assert said._replace(stress=None).relations() == ("gender", "pitch", "pace")


def test_a_third_of_the_lines_has_a_stressed_word_that_stands_once():
    world, rng, stressed = toy.World(0), random.Random(0), 0
    for _ in range(1500):
        line = manner.drawn_line(world, rng)
        drawn = manner.drawn_manner(line, rng)
        if drawn.stress is not None:
            stressed += 1
            word = line.split()[drawn.stress]
            assert line.split().count(word) == 1 and word not in manner.UNSTRESSED
    assert abs(stressed / 1500 - 1 / 3) < 0.04


@pytest.mark.parametrize("seed", [0, 1])
def test_a_reply_about_a_described_line_begins_with_its_caption_and_some_lines_have_none(seed):
    world, rng, told, about = toy.World(seed), random.Random(seed), 0, 0
    for _ in range(1500):
        asked, reply = (message["content"] for message in manner.chat(world, rng)[-2:])
        if " of it" in asked and reply.startswith("a "):
            caption, _, answer = reply.partition(". ")
            about, told = about + 1, told + (caption in asked)
            assert " of it" in answer and not set(asked) & set("0123456789")
    assert about > 400 and abs(told / about - (1 - manner.UNDESCRIBED)) < 0.06


def test_in_text_every_answer_stands_in_the_caption_before_it():
    world, rng, answered, told = toy.World(0), random.Random(0), set(), 0
    place = dict(pitch=1, pace=2, gender=3, stress=-1)
    for _ in range(500):
        page, *asked = manner.captioned_text(world, rng).split("\nquestion: ")
        if " of it is " in page:
            caption, *answers = page.rpartition("\n")[2].removesuffix(".").split(". ")
            assert sorted(answers) == sorted(
                f"the {r} of it is {caption.split()[place[r]]}"
                for r in (place if "stresses" in caption else ("pitch", "pace", "gender"))
            )
            told += 1
        for text in asked:
            relation, caption, said = re.fullmatch(
                r".*?(gender|pitch|pace|stress).*\nanswer: (a .*?)\. (.*)", text
            ).groups()
            word = caption.split()[place[relation]]
            assert caption in page
            assert said in [
                toy.in_style(style, f"{relation} of it", word, f"the {relation} of it is {word}")
                for style in toy.STYLES
            ]
            answered.add((relation, word if relation != "stress" else ""))
    assert len(answered) == 7 and told > 50, "both of every trait, and all in a row"


def test_questions_are_asked_in_unheard_voices_and_no_answer_stands_beside_speech(world):
    trained = rows_of(world / "world/speech/train.jsonl")
    asked = rows_of(world / "world/test.jsonl")
    assert not {entry["speaker"] for entry in trained} & {entry["speaker"] for entry in asked}
    assert {entry["group"] for entry in asked} == {"fact", "manner", "stress"}
    assert all("answer" not in entry and "instruction" not in entry for entry in trained)
    assert all(" stresses " in entry["caption"] for entry in asked if entry["group"] == "stress")
    texts = rows_of(world / "world/test_text.jsonl")
    assert [entry["text"] for entry in texts] == [entry["text"] for entry in asked]
    keys = {"text", "instruction", "answer", "group", "metric"}
    about_facts = [entry["group"] == "fact" for entry in asked]
    for entry, sound, about_fact in zip(texts, asked, about_facts):
        assert set(entry) == keys | ({"fact"} if about_fact else set())
        assert entry.get("fact") == sound.get("fact")


def test_no_document_holds_a_turn_of_a_chat_and_a_token_of_prosody(world):
    """But for the end of a turn, which the paper keeps alive beside speech, too."""
    vocab, corpus = Vocab(world / "speech"), prosody.Prosody(world / "prosody")
    sources = {
        "captioned": corpus,
        "text": documents.read_text(world / "world/base.jsonl"),
        "chat": documents.read_chats(world / "world/chat.jsonl"),
    }
    stream = documents.Documents(vocab, sources, {"captioned": 1, "text": 1, "chat": 1}, 0)
    kinds = [0, 0]
    for _ in range(300):
        ids = stream.next()[0].ids
        spoken = max(ids) >= vocab.speech["speech"]
        turn = vocab.special["<|im_start|>"] in ids
        kinds = [kinds[0] + spoken, kinds[1] + turn]
        assert not (spoken and turn)
    assert min(kinds) > 50, "the audit saw both kinds"


def test_captions_too_long_for_a_row_are_told_and_with_the_length_that_is_named_none_is(
    world, tmp_path, monkeypatch, capsys
):
    def run(length):
        call(
            [
                "pretrain.py", "--init", str(world / "base"), "--units", str(world / "prosody"),
                "--text", str(world / "world/base.jsonl"), "--length", str(length),
                "--steps", "1", "--batch", "1", "--device", "cpu",
                "--out", str(tmp_path / str(length)),
            ],
            monkeypatch,
        )
        return re.search(r"--length (\d+) would hold them", "".join(capsys.readouterr()))

    told = run(32)
    assert told and not run(int(told[1])) and run(int(told[1]) - 1)

    corpus = prosody.Prosody(world / "prosody")
    corpus.entries = [entry | {"caption": None} for entry in corpus.entries]
    args = argparse.Namespace(chat=None, units="corpus", length=1)
    sources = {"chat": None, "captioned": corpus}
    pretrain.warn_of_cuts(sources, Vocab(world / "speech"), args)
    assert "are cut" in "".join(capsys.readouterr())


def test_a_caption_that_counts_more_leaves_another_model(world, tmp_path, monkeypatch):
    def rows(name, *flags):
        words = [
            "pretrain.py", "--init", str(world / "base"), "--units", str(world / "prosody"),
            "--mix", "captioned=1", "--steps", "1", "--batch", "4", "--device", "cpu",
            "--dtype", "float32", *flags, "--out", str(tmp_path / name),
        ]
        call(words, monkeypatch)
        return weights.Tensors(tmp_path / name)["model.embed_tokens.weight"]

    one = rows("one")
    assert torch.equal(one, rows("same", "--caption-loss", "1"))
    assert not torch.equal(one, rows("more", "--caption-loss", "8"))
    assert not torch.equal(one, rows("less", "--echo-loss", "0"))


def test_the_recipe_on_open_weights_runs_to_its_figures_and_goes_on_after_a_stop(
    world, quick, tmp_path
):
    """One toy model is base and instruct; of six voices two are in the test alone, two choose."""
    entries = rows_of(world / "world/speech/train.jsonl")[:12]
    style = {"gender": "man", "rate": "slow", "loudness": "loud"}
    for n, entry in enumerate(entries):
        entry |= {"audio": str(world / "world/speech" / entry["audio"]), "style": style}
        entry |= {"speaker": "abcdef"[n % 6], "answer": "paris"}
    clips, questions = tmp_path / "clips.jsonl", tmp_path / "questions.jsonl"
    clips.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    questions.write_text("".join(json.dumps(entry) + "\n" for entry in entries[:2]))
    words = "speedrun_manner_real.sh", str(world), str(clips), str(tmp_path / "o"), "1"
    names = {"BASE": "instruct", "INSTRUCT": "instruct", "STEPS": "2", "QUESTIONS": str(questions)}

    def run():
        env = first_on_path(quick) | names
        return subprocess.run(["bash", *words], cwd=ROOT, env=env, capture_output=True, text=True)

    # What takes longest, text of the base's own, the search for lam and typed answers, is there.
    out = tmp_path / "o/instruct-seed1"
    out.mkdir(parents=True)
    (out / "text.jsonl").write_text('{"text": "paris is the capital of france"}\n' * 4)
    (out / "lam.json").write_text('{"lam": 0.5, "scores": {}}')
    for name in "typed", "instruct_typed":
        made = {"contains": {"value": 0.5, "n": 1}, "replies": []}
        (out / f"{name}.json").write_text(json.dumps(made))
    done = run()
    assert done.returncode == 0, done.stderr
    made = json.loads((out / "manner-real.json").read_text())
    assert made["seed"] == 1
    assert {answer["speaker"] for answer in made["answers"]} == {"b", "e"}
    assert set(made["rows"]) == {"heard", "read", "cascade"}
    assert made["typed"]["score"]["n"] == made["spoken"]["score"]["n"] == 1
    trained, asked = rows_of(out / "train.jsonl"), rows_of(out / "dev.jsonl")
    assert {entry["caption"] for entry in trained} == {"A man speaks slowly and loudly"}
    of_traits = {entry["speaker"] for entry in asked if entry["group"] != "question"}
    assert not of_traits & {entry["speaker"] for entry in trained} and not of_traits & {"b", "e"}
    questions_of = [rows_of(out / f"{name}.jsonl") for name in ("dev", "spoken")]
    known, new = ({e["text"] for e in entries if e.get("group", "question") == "question"}
                  for entries in questions_of)
    assert known and new and not known & new
    asked = rows_of(out / "spoken/manifest.jsonl")
    assert all(e["fact"] == e["text"] for e in asked), "two voices ask it, and are one fact"

    again = run()
    assert again.returncode == 0 and "== python" not in again.stdout
    clips.write_text(json.dumps(entries[0]) + "\n")
    other = run()
    assert other.returncode == 1
    assert "made of other models, CLIPS, QUESTIONS or STEPS; remove it, or" in other.stderr
    shutil.rmtree(out)
    few = run()
    assert few.returncode == 1 and few.stderr.strip().endswith("some test, two choose lam")
    assert not list(out.iterdir()), "so the next file is not another one"
    names["INSTRUCT"] = "none"
    assert "none: no such model folder" in run().stderr


def test_a_manner_is_asked_on_hearing_a_clip_on_reading_of_it_and_of_its_words_alone(
    world, tmp_path, monkeypatch
):
    asked = []

    def replies(model, vocab, prompts, **words):
        asked.append(prompts)
        return ["it is a woman" for _ in prompts]

    monkeypatch.setattr(evaluate, "replies", replies)
    entries = rows_of(world / "world/test.jsonl")[:4]
    for entry, gender in zip(entries, ("woman", "man", "man", "man")):
        entry["audio"] = str(world / "world" / entry["audio"])
        entry["style"] = {"gender": gender}
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    words = [
        "evaluate.py", "manner", str(world / "merged"), "--clips", str(tmp_path / "clips.jsonl"),
        "--template", "a {gender}: {text}", "--prompt", "who is it", "--device", "cpu",
        "--out", str(tmp_path / "m.json"),
    ]
    call(words, monkeypatch)
    made = json.loads((tmp_path / "m.json").read_text())
    assert {name: row["gender"]["value"] for name, row in made["rows"].items()} == {
        "heard": 0.25, "read": 0.25, "cascade": 0.25,
    }

    vocab = Vocab(world / "merged")
    units = range(vocab.speech["first_unit"], vocab.size)
    for name, prompts in zip(("heard", "read", "cascade"), asked):
        for prompt, entry in zip(prompts, entries):
            text = vocab.decode([i for i in prompt if i in vocab.bytes_of])
            assert entry["text"] in text and text.rstrip().endswith("who is it\nassistant"), name
            assert any(i in units for i in prompt) == (name == "heard"), name
            assert (f"a {entry['style']['gender']}: " in text) == (name == "read"), name
    words[2] = str(world / "instruct")
    with pytest.raises(ValueError, match="or a model that hears prosody"):
        call([*words[:-1], str(tmp_path / "i.json")], monkeypatch)


def test_the_same_seed_makes_the_same_world(quick, tmp_path):
    words = [
        "manner.py", "--lines", "6", "--documents", "50", "--dev", "3", "--test", "6", "--out",
    ]
    # ESpeak goes on where it was: a process each. And they hash words differently.
    for python, name in ((sys.executable, "a"), (quick / "python", "b")):
        line = [python, *words, tmp_path / name]
        subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    files = [
        path.relative_to(tmp_path / "a")
        for path in (tmp_path / "a").rglob("*")
        if path.is_file() and path.name != "recipe.json"
    ]
    assert len(files) > 20
    assert all(
        (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        for file in files
    )


def test_a_reader_says_a_line_as_its_manner_is(tmp_path):
    reader, line = manner.Reader(0), "anna goes to peru with lucy"

    def heard(**change):
        drawn = manner.Manner("man", "low", "slow", None)._replace(**change)
        entry = reader.read(tmp_path / "a.flac", line, drawn, "near")
        said = prosody.measured(audio.load(tmp_path / "a.flac"), entry["words"])
        return entry, said[0][1]["speaker"], said[4][1]

    entry, speaker, word = heard()
    assert entry["text"] == line
    assert entry["caption"] == "a low slow man"
    assert entry["style"] == {"gender": "man", "pitch": "low", "pace": "slow"}
    assert heard(stress=3)[2]["pitch"] - word["pitch"] > 1
    assert heard(gender="woman")[1] - speaker > 6 and heard(pitch="high")[1] - speaker > 3
    assert heard(pace="fast")[0]["seconds"] < 0.8 * entry["seconds"]


def test_a_table_has_a_column_a_group_and_the_answers_of_said_rows(
    world, tmp_path, monkeypatch, capsys
):
    made = json.loads((world / "merged.json").read_text())["groups"]
    assert {
        name: {m: c["n"] for m, c in made[name].items()} for name in ("fact", "manner", "stress")
    } == {"fact": {"exact": 3}, "manner": {"ends": 4}, "stress": {"ends": 2}}
    names = "merged", "typed", "cascade", "speech", "instruct_rows"
    call(["benchmark.py", "show", *(str(world / f"{name}.json") for name in names)], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fact", "manner", "stress"]
    assert len(lines) == 6
    assert all(len(line.split()) == 4 for line in lines[1:])
    (tmp_path / "x.json").write_text('{"groups": 5}')
    with pytest.raises(ValueError, match="no scores by group"):
        call(["benchmark.py", "show", str(tmp_path / "x.json")], monkeypatch)
    (tmp_path / "x.json").write_text(
        '{"groups": {"a": {"exact": {"value": 1.0}, "wer": {"value": 0.5}}}}'
    )
    with pytest.raises(ValueError, match="group 'a' is scored by exact and wer"):
        call(["benchmark.py", "show", str(tmp_path / "x.json")], monkeypatch)
    with pytest.raises(ValueError, match="cannot hear"):
        call(
            [
                "benchmark.py", "questions", str(world / "instruct"),
                str(world / "test/manifest.jsonl"), "--device", "cpu",
                "--out", str(tmp_path / "i.json"),
            ],
            monkeypatch,
        )


def test_ends_is_right_of_a_reply_that_ends_with_the_answer_whatever_it_says_before():
    entries = [{"answer": "the pitch of it is high.", "metric": "ends"}] * 3
    said = [
        "A high fast man. The pitch of it is high.", "the pitch of it is high. or low",
        "the pitch of it is high. no",
    ]
    assert benchmark.scores_by_metric(entries, said)["ends"]["value"] == round(1 / 3, 4)
    assert [benchmark.ends("a high fast " + word, "man") for word in ("man", "woman", "man.")] == [
        True, False, False,
    ]


def test_a_model_of_prosody_hears_the_words_that_its_transcriber_writes_down_and_else_nothing(
    world, speedrun, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(listen, "WORDS", 20)  # a model of six steps never ends
    clip = world / "world/speech/audio/00000.flac"
    chat = Chat(world / "merged")
    with pytest.raises(
        ValueError,
        match="no one writes them down; give --transcriber, a Whisper folder or a model",
    ):
        chat.hear(audio.load(clip), clip)
    # Unless the user writes them, in quotes.
    line = f'{clip} "anna likes rice" what is the pace of it'
    content, notes = take(chat, parts_of(line), transcribe=True)
    assert notes["heard"] == ["anna likes rice"] and notes["units"] == 3
    assert content[1:] == [" what is the pace of it"]
    assert [word for word, _ in content[0]] == ["", "anna", " likes", " rice"]
    assert take(chat, parts_of(f'{clip} "anna"'), True)[0][1:] == []
    for wrong in (f'{clip} "" what', f"{clip} what", str(clip), f'{clip} what is "anna"'):
        with pytest.raises(ValueError, match='behind the path, in "quotes"'):
            take(chat, parts_of(wrong), True)
    ears, units = str(speedrun / "speech"), Chat(speedrun / "speech")
    wanted = units.heard(units.hear(audio.load(clip), clip)[0])
    chat = Chat(world / "merged", transcriber=ears)
    said, seconds = chat.hear(audio.load(clip), clip)
    assert seconds > 0.5 and chat.heard(said) == said.text() == wanted
    assert said[0][0] == "" and len(chat.vocab.content([said])) > len(said)
    content, notes = take(chat, parts_of(line), transcribe=True)
    assert notes["heard"] == [wanted] and '"anna likes rice"' in content[1], "then it is text"
    with pytest.raises(SystemExit) as end:
        call(
            [
                "chat.py", str(world / "merged"), str(clip), "--transcriber", ears,
                "--transcribe", "--device", "cpu",
            ],
            monkeypatch,
        )
    assert not end.value.code
    told = capsys.readouterr().out
    assert f"heard: {wanted}" in told and f" s, {len(wanted.split())} words]" in told
    for folder, who, why in (
        (world / "merged", world / "merged", "hears how words are said, not which"),
        (speedrun / "merged", ears, "leave the flag out"),
        (world / "instruct", ears, "leave the flag out"),
        (world / "merged", tmp_path / "nowhere", "nowhere"),
    ):
        with pytest.raises((ValueError, OSError), match=why):
            Chat(folder, transcriber=who)
    with pytest.raises(ValueError, match="--hubert x: .* hears no units"):
        Chat(world / "merged", hubert="x")


def test_a_benchmark_takes_the_words_of_a_row_or_those_that_a_transcriber_writes_down(
    world, speedrun, tmp_path, monkeypatch
):
    entry = rows_of(world / "test/manifest.jsonl")[0]
    (tmp_path / "questions.jsonl").write_text(json.dumps(entry) + "\n")
    heard = []
    monkeypatch.setattr(
        Vocab, "turn", lambda vocab, messages: heard.append(messages[-1]["content"]) or [1]
    )
    ears = Chat(world / "merged", transcriber=speedrun / "speech")
    wanted, _ = ears.hear(audio.load(entry["audio"]), "")
    for n, flags in enumerate(([], ["--transcriber", str(speedrun / "speech")])):
        call(
            [
                "benchmark.py", "questions",
                str(world / "merged"), str(tmp_path / "questions.jsonl"),
                *flags, "--device", "cpu", "--out", str(tmp_path / f"{n}.json"),
            ],
            monkeypatch,
        )
    (given, *asked), (own, *again) = heard
    assert given.text() == entry["text"]
    assert own.text() == wanted.text() != entry["text"]
    assert asked == again == [" " + entry["instruction"]]


def test_the_transcript_of_a_row_of_a_manifest_is_not_written_beside_its_sound(
    world, speedrun, tmp_path, monkeypatch
):
    entry = rows_of(world / "world/test.jsonl")[0]
    entry |= {"audio": str(world / "world" / entry["audio"])}
    question = entry | {"words": None, "text": "what is this"}
    (tmp_path / "questions.jsonl").write_text(f"{json.dumps(entry)}\n{json.dumps(question)}\n")
    heard = []
    monkeypatch.setattr(
        Vocab, "turn", lambda vocab, messages: heard.append(messages[-1]["content"]) or [1]
    )
    call(
        [
            "benchmark.py", "questions",
            str(speedrun / "merged"), str(tmp_path / "questions.jsonl"),
            "--device", "cpu", "--out", str(tmp_path / "x.json"),
        ],
        monkeypatch,
    )
    told = f" {entry['instruction']}" if entry["instruction"] else None
    assert heard[0][1:] == ([told] if told else [])
    assert heard[1][1] == "\n".join(filter(None, [" what is this", entry["instruction"]]))


@pytest.mark.parametrize(
    "change, flags, said",
    [
        ({"audio": "gone.flac", "said": None}, ["--transcriber", "{ears}"], "gone.flac"),
        ({"audio": "short.wav", "said": None}, ["--transcriber", "{ears}"], "are under one frame"),
        ({"said": None, "words": None}, [], "no one writes them down"),
    ],
)
def test_a_row_that_cannot_be_heard_is_told_before_the_first_is_asked(
    change, flags, said, world, speedrun, tmp_path, monkeypatch
):
    entries = rows_of(world / "test/manifest.jsonl")
    entries[-1] |= change
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 16_000)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    monkeypatch.setattr(benchmark, "replies", lambda *_, **__: pytest.fail("it was asked"))
    monkeypatch.setattr(benchmark, "BATCH", 1)
    flags = [flag.format(ears=speedrun / "speech") for flag in flags]
    with pytest.raises((ValueError, OSError), match=said):
        call(
            [
                "benchmark.py", "questions",
                str(world / "merged"), str(tmp_path / "questions.jsonl"),
                *flags, "--device", "cpu", "--out", str(tmp_path / "x.json"),
            ],
            monkeypatch,
        )


def test_every_word_of_this_world_is_one_token(world):
    vocab = Vocab(world / "world/tokenizer")
    texts = [entry["text"] for entry in rows_of(world / "world/base.jsonl")] + [
        m["content"] for entry in rows_of(world / "world/chat.jsonl") for m in entry["messages"]
    ]
    words = {
        word
        for text in texts
        if " transcript:" not in text
        for word in re.findall(r" [a-z]+", text)
        if word.strip() in toy_words()
    }
    assert len(words) > 100 and all(len(vocab.encode(word)) == 1 for word in words)


def toy_words():
    """The words that captions and questions about them are made of, and the names of the world."""
    said = " ".join(
        [
            *manner.QUESTIONS, *manner.RELATIONS, *manner.GENDERS, *manner.PITCHES,
            *manner.PACES, "stresses", *toy.NAMES, *toy.PEOPLE,
        ]
    )
    return set(said.replace("{r}", "").split())


def test_its_documents_can_be_looked_at_and_layouts_of_units_are_refused(
    world, tmp_path, monkeypatch, capsys
):
    call(["documents.py", str(world / "speech"), "--units", str(world / "prosody")], monkeypatch)
    call(["vocab.py", "show", str(world / "speech")], monkeypatch)
    said = capsys.readouterr().out
    assert said.count("captioned\n    ") == 2
    assert "<|pitch_" in said
    assert "spoken turn" in said
    with pytest.raises(ValueError, match="--mix wants interleave, but no data"):
        call(
            [
                "pretrain.py", "--init", str(world / "base"), "--units", str(world / "prosody"),
                "--mix", "interleave=1", "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )


def test_a_behaviour_is_added_to_hearing_that_is_there_and_nothing_is_heard_again(
    asked, world, tmp_path, monkeypatch
):
    told, lines = asked("reuse", world, "manner")
    assert "minutes to learn, once" in told
    trained = [words for script, *words in lines if script.endswith("pretrain.py")]
    assert [words[-1] for words in trained] == ["reuse/thanks/instruct", "reuse/over/instruct"]
    assert not any("--units" in words for words in trained)
    for words in trained:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        args = pretrain.settled(pretrain.arguments(), 1)
        own = next(
            words
            for words in speedrun_commands("out/manner", "speedrun_manner.sh")
            if "--chat" in words
        )
        monkeypatch.setattr(sys, "argv", own)
        wanted = pretrain.settled(pretrain.arguments(), 1)
        assert {name for name in vars(args) if getattr(args, name) != getattr(wanted, name)} == {
            "init", "chat", "out",
        }
    sums = {
        words[-1]: dict(zip(words[::2], words[1::2]))
        for script, *words in lines
        if script.endswith("merge.py")
    }
    assert {name: row["--speech"] for name, row in sums.items()} == {
        "reuse/thanks/merged": "speech",
        "reuse/over/merged": "speech",
        "reuse/half": "speech",
        "reuse/both": "reuse/half",
    }
    chats = rows_of(tmp_path / "out/manner/reuse/thanks/chat.jsonl")
    plain = rows_of(world / "world/chat.jsonl")
    assert all(
        a["messages"][-1]["content"] == b["messages"][-1]["content"] + " thank you"
        for a, b in zip(chats, plain)
    )
    assert len(chats) == len(plain)
    entries = rows_of(tmp_path / "out/manner/reuse/over/test.jsonl")
    before = rows_of(world / "test/manifest.jsonl")
    assert [entry["answer"] for entry in entries] == [entry["answer"] + " over" for entry in before]
    assert [entry["said"] for entry in entries] == [entry["said"] for entry in before]


def test_desta_learns_from_what_the_same_instruct_model_says_of_captions(
    asked, world, speedrun, quick, tmp_path
):
    """speedrun_desta.sh behind the other two, with two steps, and its experiment."""
    home, bin = tmp_path / "home", tmp_path / "two_steps"
    for folder in (home / "out", bin):
        folder.mkdir(parents=True)
    for file in (*ROOT.glob("*.py"), ROOT / "speedrun_desta.sh"):
        shutil.copy(file, home)
    (bin / "python").write_text(f"""#!/bin/bash
[ "$1 $2" = "desta.py train" ] && fewer="--steps 2 --batch 2"
exec {quick}/python "$@" $fewer
""")
    (bin / "python").chmod(0o755)

    def run():
        words = ["bash", str(home / "speedrun_desta.sh")]
        return subprocess.run(words, capture_output=True, text=True, env=first_on_path(bin))

    (home / "out/hubert").symlink_to(speedrun / "hubert")
    first = run()
    assert first.returncode == 1
    assert "out/manner/instruct: not there; run speedrun.sh and speedrun_manner.sh first" in (
        first.stderr
    )

    # So small a model does not end its replies: its targets are there already.
    shutil.copytree(world, home / "out/manner")
    entries = audio.read_manifest(world / "world/speech/train.jsonl")
    targets = [entry | {"prompt": "who", "target": f"{entry['caption']}. x"} for entry in entries]
    targets.append(entries[0] | {"caption": "a man", "prompt": "which stress", "target": "guessed"})
    (home / "out/desta").mkdir()
    lines = [json.dumps(entry).replace(str(world), str(home / "out/manner")) for entry in targets]
    (home / "out/desta/captioned.jsonl").write_text("\n".join(lines) + "\n")
    (home / "out/desta/others.jsonl").write_text(lines[0] + "\n")
    done = run()
    assert done.returncode == 0, done.stderr
    shown = {line.split()[0] for line in done.stdout.splitlines()[-4:]}
    assert shown == {"heard", "read", "../manner/cascade", "../manner/merged"}
    read = json.loads((home / "out/desta/read.json").read_text())
    heard = json.loads((home / "out/desta/heard.json").read_text())
    asked_of = [entry["group"] for entry in rows_of(world / "test/manifest.jsonl")]
    assert len(heard["replies"]) == len(asked_of)
    assert len(read["replies"]) == len(asked_of) - asked_of.count("fact")
    assert heard["groups"].keys() - read["groups"].keys() == {"fact"}
    again = run()
    assert "== python" not in again.stdout and again.stdout.splitlines()[-4:] == (
        done.stdout.splitlines()[-4:]
    )

    _, lines = asked("desta", home / "out")
    flags = [words for script, *words in lines if script.endswith("desta.py")]
    assert [words[-1] for words in flags] == ["no_transcript", "answers"]
    (own,) = [
        words[1:]
        for words in speedrun_commands("out", "speedrun_desta.sh")
        if words[:2] == ["desta.py", "train"]
    ]
    assert [words[1] for words in flags] == ["targets.jsonl", "answers.jsonl"]
    assert set(flags[0]) - set(flags[1]) == {"targets.jsonl", "--no-transcript", "no_transcript"}
    assert set(own) - set(flags[1]) == {
        "$to/targets.jsonl", "$instruct", "$to/states", "$to/adapter",
    }
    answers = rows_of(tmp_path / "out/desta/answers.jsonl")
    assert {entry["target"] for entry in answers} == {"x"}, "no caption, and no guess"

    # Its adapter, and no other, in front of models that it was not trained with.
    trained = home / "out/desta/adapter"
    of = runs.read_json(trained / "desta.json")
    for name, model in (("in_sum", "merged"), ("in_thanks", "reuse/thanks/instruct")):
        plugged = tmp_path / "out/desta" / name
        made = runs.read_json(plugged / "desta.json")
        path = (tmp_path / "out/manner" / model).resolve()
        sha = of["sha256"] | {"model": runs.fingerprint(path)}
        assert made == of | {"model": str(path), "sha256": sha}
        ours = (plugged / "model.safetensors").read_bytes()
        assert ours == (trained / "model.safetensors").read_bytes()
    assert isinstance(adapter.load(tmp_path / "out/desta/in_sum")[1], adapter.Listener)
    thanks = rows_of(tmp_path / "out/manner/reuse/thanks/spoken.jsonl")
    wanted = rows_of(tmp_path / "out/manner/world/test.jsonl")
    assert [e["answer"] for e in thanks] == [f"{e['answer']} thank you" for e in wanted]
    answered = [words[1:3] for script, *words in lines if script.endswith("benchmark.py")]
    assert all(Path(entry["audio"]).exists() for entry in thanks)
    assert ["in_thanks", "../manner/reuse/thanks/spoken.jsonl"] in answered


def test_the_papers_ablations_drop_what_they_say_and_choose_lam_on_dev_questions(
    asked, world, tmp_path, monkeypatch
):
    _, lines = asked("paper", world, "manner")
    trained = [words for script, *words in lines if script.endswith("pretrain.py")]
    wanted = (
        ("base", "paper/captions/prosody", "paper/captions/speech"),
        ("base", "paper/text/prosody", "paper/text/speech"),
        ("instruct", "prosody", "paper/from_instruct"),
    )
    for entry, words in zip(wanted, trained, strict=True):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        args = pretrain.arguments().parse_args()
        assert (args.init, args.units, args.out) == entry
    best = str(json.loads((world / "lam.json").read_text())["lam"])
    assert {
        dict(zip(words[::2], words[1::2]))["--lam"]
        for script, *words in lines
        if script.endswith("merge.py")
    } == {best}
    for folder in ("prosody", "test"):
        whole = rows_of(world / folder / "manifest.jsonl")
        bare, dumb = (
            rows_of(tmp_path / "out/manner/paper" / what / folder / "manifest.jsonl")
            for what in ("captions", "text")
        )
        assert [entry | {"caption": was["caption"]} for entry, was in zip(bare, whole)] == whole
        assert not any("caption" in entry for entry in bare)
        assert [entry["said"] for entry in dumb] == [
            [["", numbers] for _, numbers in entry["said"]] for entry in whole
        ]
    assert prosody.Prosody(tmp_path / "out/manner/paper/text/prosody")[0].text() == ""


def test_lam_is_the_one_whose_sum_has_the_best_mean_over_groups_of_questions(
    world, tmp_path, monkeypatch, capsys
):
    entries = [{"group": group, "metric": "exact", "answer": "yes", "text": "?"} for group in "aab"]
    asked = []
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    # Means 0.5, 0.75, 0.5; right 2, 2, 1.
    replies = {0.5: ["yes", "yes", "no"], 0.6: ["yes", "no", "yes"], 0.7: ["no", "no", "yes"]}
    monkeypatch.setattr(benchmark, "LAMS", list(replies))
    monkeypatch.setattr(
        benchmark, "answering",
        lambda args, model, vocab, ears: lambda part: asked.append(model) or replies[model],
    )
    plans = []
    monkeypatch.setattr(
        benchmark, "model_at", lambda plan, config, lam, device: plans.append(plan) or lam
    )
    words = [
        "benchmark.py", "lam", str(tmp_path / "dev.jsonl"), "--signs", "0.5",
        *(f"--{name}={world / name}" for name in ("base", "instruct", "speech")),
        "--device", "cpu",
    ]
    # It stops at the second; the first is not asked again.
    second = replies.pop(0.6)
    with pytest.raises(KeyError):
        call([*words, "--out", str(tmp_path / "lam.json")], monkeypatch)
    replies[0.6] = second
    call([*words, "--out", str(tmp_path / "lam.json")], monkeypatch)
    made = json.loads((tmp_path / "lam.json").read_text())
    assert made["lam"] == 0.6
    assert asked == [0.5, 0.6, 0.6, 0.7]
    near = Merge(*(world / name for name in ("base", "instruct", "speech")), signs=0.5).nearer
    assert all(torch.equal(plan.nearer, near) for plan in plans)
    assert made["scores"]["0.5"]["a"]["value"] == 1.0
    assert capsys.readouterr().out.splitlines()[-1] == "lam 0.6 has the best mean"


@pytest.mark.parametrize(
    "entries, said",
    [
        ([{"group": "a", "metric": "wer"}], "of which less is better"),
        ([{"group": "a", "metric": "exact"}, {"metric": "exact"}], "question 2: has no group"),
        ([{"group": "a", "metric": "exact"}, {"group": "a", "metric": "ends"}], "exact and ends"),
    ],
)
def test_rows_by_which_no_lam_can_be_chosen_are_told_before_a_model_is_loaded(
    entries, said, world, tmp_path, monkeypatch
):
    entries = [entry | {"answer": "yes", "text": "?"} for entry in entries]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    monkeypatch.setattr(benchmark, "opened", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=said):
        call(
            [
                "benchmark.py", "lam", str(tmp_path / "dev.jsonl"),
                *(f"--{name}={world / name}" for name in ("base", "instruct", "speech")),
                "--device", "cpu", "--out", str(tmp_path / "lam.json"),
            ],
            monkeypatch,
        )


def test_a_sum_in_memory_answers_as_the_one_that_is_written(world):
    made = json.loads((world / "lam.json").read_text())
    assert set(made["scores"]) == {str(lam) for lam in benchmark.LAMS}
    assert made["lam"] in benchmark.LAMS
    args = argparse.Namespace(asked=str(world / "test/manifest.jsonl"), transcriber=None, limit=12)
    model, vocab, ears = listen.load(world / "merged")
    plan = Merge(*(str(world / name) for name in ("base", "instruct", "speech")), signs=0.5)
    name = "model.embed_tokens.weight"
    assert torch.equal(plan.merged(name, 0.7), weights.Tensors(world / "merged")[name])
    again = evaluate.model_at(plan, model.config, 0.7, "cpu")
    entries = benchmark.read_questions(args.asked)
    assert benchmark.answering(args, again, vocab, ears)(entries) == benchmark.answering(
        args, model, vocab, ears
    )(entries)


def test_runs_of_several_seeds_are_joined_as_the_readme_shows_them(
    world, tmp_path, monkeypatch, capsys
):
    call(
        ["benchmark.py", "report", str(world), str(world), "--out", str(tmp_path / "r.json")],
        monkeypatch,
    )
    made = json.loads((tmp_path / "r.json").read_text())
    one, other = made["seeds"]
    assert one == other
    assert one["seed"] == 0
    assert one["lam"] == 0.7
    assert one["signs"] == 0.5
    recipe = json.loads((world / "speech/recipe.json").read_text())
    assert one["machine"] == recipe["machine"], "of the training, not of the joining"
    assert set(one["rows"]) == {"merged", "typed", "cascade", "speech", "instruct_rows"}
    assert set(one["rows"]["merged"]) == {"fact", "manner", "stress"}
    assert set(one["rel"]) == {"instruct", "speech"}
    assert len(one["dev"]) == len(benchmark.LAMS)
    other["rows"]["merged"]["manner"]["value"] = one["rows"]["merged"]["manner"]["value"] + 0.5
    mean = one["rows"]["merged"]["manner"]["value"] + 0.25
    del one["rows"]["typed"]["stress"], other["rows"]["typed"]["stress"]
    lines = [line.split(" | ") for line in benchmark.markdown(made["seeds"]).splitlines()]
    assert lines[0] == ["|", "fact", "manner", "stress |"]
    assert lines[2][0] == "| merged"
    assert lines[2][2] == f"{mean:.2f}"
    assert lines[-1][0] == "| typed" and lines[-1][3] == " |"


@pytest.mark.parametrize(
    "groups, said",
    [
        (5, "no scores by group"),
        ({"a": 3}, "no scores by group"),
        ({"a": {"ends": {}}}, "no scores by group"),
        ({}, "no scores by group"),
        (None, "no typed.json, so no finished run"),
        ("gone", "no instruct_rows.json, so no finished run"),
    ],
)
def test_a_run_that_cannot_be_joined_is_told_and_nothing_is_written(
    groups, said, world, tmp_path, monkeypatch
):
    shutil.copytree(world, tmp_path / "run")
    if groups is None:
        (tmp_path / "run/typed.json").unlink()
    if groups == "gone":
        (tmp_path / "run/instruct_rows.json").unlink()
    if groups not in (None, "gone"):
        (tmp_path / "run/typed.json").write_text(json.dumps({"groups": groups}))
        with pytest.raises(ValueError, match=said):
            call(["benchmark.py", "show", str(tmp_path / "run/typed.json")], monkeypatch)
    with pytest.raises(ValueError, match=said):
        call(
            [
                "benchmark.py", "report", str(world), str(tmp_path / "run"),
                "--out", str(tmp_path / "r.json"),
            ],
            monkeypatch,
        )
    assert not (tmp_path / "r.json").exists()


def test_the_pages_tell_what_the_results_hold():
    readme, page = (
        " ".join((ROOT / name).read_text().split()) for name in ("README.md", "TEACHING.md")
    )
    seeds, reuse, paper = (
        json.loads((ROOT / f"results/{name}.json").read_text())
        for name in ("manner", "reuse", "paper")
    )
    seeds = seeds["seeds"]
    assert " ".join(benchmark.markdown(seeds).split()) in readme
    named = [format(seed["rows"]["merged"]["stress"]["value"], ".2f") for seed in seeds]
    assert f"Stress, seed by seed: {', '.join(named)}. The last is below its cascade." in readme
    last = seeds[-1]["rows"]
    assert last["merged"]["stress"]["value"] < last["cascade"]["stress"]["value"]
    cascade = sum(seed["rows"]["cascade"]["fact"]["value"] for seed in seeds) / len(seeds)
    assert f"Missed aims: facts {0.95 * cascade:.2f}, stress 0.60." in readme
    earlier = json.loads((ROOT / "results/manner-earlier.json").read_text())["seeds"][-3:]
    facts = sum(seed["rows"]["merged"]["fact"]["value"] for seed in earlier) / 3
    assert f"Without this, facts were {facts:.2f} (" in readme
    assert (
        f"| {min(seed['lam'] for seed in seeds)} to {max(seed['lam'] for seed in seeds)} (on dev) |"
        in readme
    )
    value = lambda table, row, group: f"{table[row][group]['value']:.2f}"
    facts, stress = (
        ", ".join(value(reuse, f"reuse/{name}", group) for name in ("thanks", "over"))
        for group in ("fact", "stress")
    )
    assert f"facts {facts}, stress {stress} (`results" in readme
    without = {"no_text": "speech", "no_captions": "captions", "from_instruct": "learns to hear)"}
    for name, what in without.items():
        scores = [value(paper, f"paper/{name}", group) for group in ("fact", "manner", "stress")]
        assert f"{what} {', '.join(scores)}" in readme
    desta = json.loads((ROOT / "results/desta-toy.json").read_text())
    for group, what in (("fact", "facts"), ("manner", "manner"), ("stress", "stress")):
        scores = [value(desta, f"seed{n}/heard", group) for n in range(3)]
        assert f"{what} {', '.join(scores)}" in readme
    plugged = json.loads((ROOT / "results/desta-plugged.json").read_text())
    scores = [value(plugged, "heard", group) for group in ("fact", "manner", "stress")]
    assert f"seed 0, has {', '.join(scores)} (fact, manner, stress;" in readme
    for table in (reuse, paper, desta, plugged):
        assert " ".join(benchmark.table(table).split()) in page
    lora = json.loads((ROOT / "results/manner-lora.json").read_text())["seeds"]
    whole = json.loads((ROOT / "results/manner-earlier.json").read_text())["seeds"][-4:]
    assert [seed["seed"] for seed in whole] == [0, 0, 1, 2]
    facts, stress, whole_facts, whole_stress = (
        [value(seed["rows"], "merged", group) for seed in runs]
        for runs in (lora, whole)
        for group in ("fact", "stress")
    )
    assert (
        f"facts {facts[0]} (whole matrices, two runs: {' and '.join(whole_facts[:2])}), stress "
        f"{stress[0]} ({' and '.join(whole_stress[:2])}). Seeds 1 and 2 do not: facts "
        f"{' and '.join(facts[1:])} ({' and '.join(whole_facts[2:])}), stress "
        f"{' and '.join(stress[1:])} ({' and '.join(whole_stress[2:])}; "
        "`results/manner-lora.json`)."
    ) in page


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"said": 5}, "wanted [[word"),
        ({"said": [["a", ["x"]]]}, "wanted [[word"),
        ({"said": [["a", [1.7]]]}, "wanted [[word"),
        ({"said": [["a", [math.inf]]]}, "wanted [[word"),
        ({"said": [["a", [10**30]]]}, "wanted [[word"),
        ({"said": [["a", [-1]]]}, "unit -1 is outside"),
        ({"said": [["a", [900]]]}, "unit 900 is outside"),
        ({"text": "hi", "group": ["a"]}, "wanted a string"),
    ],
)
def test_rows_of_prosody_of_the_wrong_form_are_shown(entry, said, world, tmp_path, monkeypatch):
    (tmp_path / "questions.jsonl").write_text(json.dumps(entry | {"answer": "x"}) + "\n")
    with pytest.raises(ValueError, match=re.escape(said)):
        call(
            [
                "benchmark.py", "questions",
                str(world / "merged"), str(tmp_path / "questions.jsonl"),
                "--device", "cpu", "--out", str(tmp_path / "o.json"),
            ],
            monkeypatch,
        )


def test_words_with_prosody_are_no_units(world, speedrun, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError,
        match="has questions with .said., words with their prosody, and .* does not read such",
    ):
        call(
            [
                "benchmark.py", "questions", str(speedrun / "merged"),
                str(world / "test/manifest.jsonl"), "--device", "cpu",
                "--out", str(tmp_path / "o.json"),
            ],
            monkeypatch,
        )
