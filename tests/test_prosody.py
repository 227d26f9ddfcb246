import json
import re
from argparse import Namespace

import numpy as np
import pytest
import soundfile

import audio
import documents
import listen
import prosody
import runs
import voices
import whisper
from conftest import call, shared
from prosody import BINS, KINDS, NAMES, UNVOICED, aligned, level, measured, pitch
from vocab import Said, Vocab

LINE = "anna goes to peru with lucy"


@pytest.fixture(scope="module")
def speaker():
    return voices.Speaker()


def buzz(hertz, seconds=1.0):
    """A voice without a mouth: harmonics that fall by 6 dB an octave."""
    t = np.arange(int(16000 * seconds)) / 16000
    return 0.1 * sum(
        np.sin(2 * np.pi * hertz * n * t) / n for n in range(1, int(7000 / hertz))
    ).astype(np.float32)


@pytest.mark.parametrize("hertz", [70, 100, 141.4, 200, 331, 450])
def test_the_pitch_of_a_buzz_is_its_own_and_no_octave_of_it(hertz):
    found = pitch(buzz(hertz))[5:-5]
    assert len(found) == 90 and abs(found / hertz - 1).max() < 0.01


def test_noise_and_silence_have_no_pitch():
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    assert (pitch(noise) > 0).mean() < 0.05
    assert not pitch(np.zeros(16000, np.float32)).any()
    assert len(pitch(np.zeros(100, np.float32))) == 0


def test_a_glide_is_followed_and_has_its_slope():
    t = np.arange(16000) / 16000
    # Six semitones in a second.
    hertz = 120 * 2 ** (t / 2)
    found = pitch(
        sum(np.sin(2 * np.pi * n * np.cumsum(hertz) / 16000) / n for n in range(1, 20)).astype(
            np.float32
        )
    )[5:-5]
    assert abs(found / hertz[(np.arange(5, 95) * 160 + 80)] - 1).max() < 0.02
    shape = prosody.contour(12 * np.log2(found), speaker=12 * np.log2(120))
    assert abs(shape["slope"] - 6) < 0.2
    assert abs(shape["pitch"] - 3) < 0.2
    assert 4 < shape["range"] < 6


def test_pitch_on_real_people_agrees_with_praat():
    """Within half a semitone in 95 % of the frames that both find voiced; an octave away in at
    most 3 %.
    """
    parselmouth = pytest.importorskip("parselmouth")
    clips = sorted(shared("librispeech_mini").rglob("*.flac"))[100:112]
    near = 0
    far = 0
    both = 0
    for clip in clips:
        samples = audio.load(clip)
        ours = pitch(samples)
        praat = parselmouth.Sound(samples.astype(float), 16000).to_pitch_ac(
            time_step=0.01, pitch_floor=prosody.LOWEST, pitch_ceiling=prosody.HIGHEST
        )
        theirs = np.nan_to_num(
            [praat.get_value_at_time((n + 0.5) * 0.01) for n in range(len(ours))]
        )
        voiced = (ours > 0) & (theirs > 0)
        apart = abs(12 * np.log2(ours[voiced] / theirs[voiced]))
        near, far, both = near + (apart < 0.5).sum(), far + (apart > 6).sum(), both + voiced.sum()
    assert both > 2000 and near > 0.95 * both and far < 0.03 * both


def test_level_is_in_decibels_of_full_scale():
    assert abs(level(buzz(200)).mean() - level(0.1 * buzz(200)).mean() - 20) < 0.01
    assert np.allclose(level(np.full(1600, 0.5, np.float32))[2:-2], 20 * np.log10(0.5), atol=1e-3)
    assert abs(prosody.mean_level(np.array([-20.0, -120.0])) - -23.01) < 0.01
    assert np.isnan(prosody.mean_level(np.array([]))), "half of the energy"


@pytest.mark.parametrize("voice", ["en-us+m1", "en-us+f3"])
@pytest.mark.parametrize("rate", [120, 160, 210])
def test_words_are_found_in_time_from_the_text_alone(speaker, voice, rate):
    """A cut falls somewhere in the pause before a word: eSpeak's own times say where that
    pause ends.
    """
    samples, words = speaker.say(LINE, voice, rate)
    found = aligned(LINE, samples)
    assert [word for word, _, _ in found] == LINE.split()
    assert max(abs(ours[1] - theirs[1]) for ours, theirs in zip(found, words)) < 0.12
    assert all(a[2] == b[1] for a, b in zip(found, found[1:]))


def test_a_text_that_cannot_be_in_a_clip_still_gets_times_in_order(speaker):
    samples, _ = speaker.say("no", "en-us+m1")
    found = aligned(" ".join(["anything"] * 60), samples)
    assert len(found) == 60
    assert [start for _, start, _ in found] == sorted(start for _, start, _ in found)
    assert aligned("", samples) == [] and aligned("a", samples[:10]) == []


@pytest.mark.parametrize("voice", ["en-us+m1", "en-us+f1", "en+f2"])
def test_a_stressed_word_is_longer_and_higher_and_a_woman_higher_than_a_man(speaker, voice):
    plain, stressed = (measured(*speaker.say(LINE, voice, stress=stress)) for stress in (None, 3))
    assert [word for word, _ in stressed] == ["", "anna", " goes", " to", " peru", " with", " lucy"]
    more = {kind: stressed[4][1][kind] - plain[4][1][kind] for kind in ("pitch", "length")}
    assert more["length"] > 0.4 and more["pitch"] > 0.5
    man, woman = (
        measured(*speaker.say(LINE, v))[0][1]["speaker"] for v in ("en-us+m1", "en-us+f1")
    )
    assert woman - man > 6


def test_a_words_pitch_length_and_loudness_are_told_against_the_speakers_own(speaker):
    samples, words = speaker.say(LINE, "en-us+m1")
    said, softer = measured(samples, words), measured(0.5 * samples, words)
    assert abs(said[0][1]["level"] - softer[0][1]["level"] - 20 * np.log10(2)) < 0.05
    for (_, one), (_, other) in zip(said[1:], softer[1:]):
        assert all(abs(one[kind] - other[kind]) < 0.05 for kind in ("length", "loud")), one

    slow, fast = (measured(*speaker.say(LINE, "en-us+m1", rate)) for rate in (120, 210))
    assert slow[0][1]["letter"] - fast[0][1]["letter"] > 0.5, "octaves"
    assert all(abs(a[1]["length"] - b[1]["length"]) < 0.5 for a, b in zip(slow[1:], fast[1:]))
    for said in (slow, fast):
        assert abs(np.median([of_word["length"] for _, of_word in said[1:]])) < 1e-9
        deep = np.median([of_word["pitch"] for _, of_word in said[1:]])
        assert abs(deep) < 1 and said[0][1]["speaker"] > 12 * np.log2(60)


def test_a_words_length_is_told_against_its_letters():
    """Two words of half a second: the one with twice the letters, each with its space, is an
    octave shorter.
    """
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    _, (_, short), (_, long) = measured(noise, [["ba", 0.0, 0.5], ["bonds", 0.5, 1.0]])
    assert abs(short["length"] - long["length"] - 1) < 0.05


def test_a_pause_is_told_and_a_small_gap_is_not(speaker):
    samples, words = speaker.say("yes no", "en-us+m1")
    at = int(words[1][1] * 16000)
    longer = np.concatenate([samples[:at], np.zeros(8000, np.float32), samples[at:]])
    moved = [words[0], ["no", words[1][1] + 0.5, words[1][2] + 0.5]]
    assert "pause" not in measured(samples, words)[1][1]
    assert abs(2 ** measured(longer, moved)[1][1]["pause"] - 0.55) < 0.08


def test_a_word_without_a_voice_has_no_pitch_but_length_and_loudness():
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    said = measured(noise, [["sh", 0.0, 1.0]])
    numbers = prosody.numbered(said, np.zeros((len(KINDS), BINS - 1), np.float32))
    assert [n == UNVOICED for n in numbers[1][1]] == [True, True, True, False, False]
    assert [n == UNVOICED for n in numbers[0][1]] == [True, False, False]


# --- a folder, its tokens, its documents ---


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A manifest of twelve clips, read by a man and a woman, with captions."""
    folder, speaker = tmp_path_factory.mktemp("spoken"), voices.Speaker()
    entries = []
    for n in range(12):
        samples, words = speaker.say(
            LINE, ("en-us+m1", "en-us+f1")[n % 2], 120 + 8 * n, 30 + 4 * n, stress=n % 6
        )
        (folder / f"{n}.flac").write_bytes(voices.encoded(samples, "FLAC"))
        entries.append(
            {
                "audio": f"{n}.flac",
                "text": LINE,
                "words": words,
                "caption": ("a man", "a woman")[n % 2],
            }
        )
    (folder / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_every_bin_of_a_corpus_holds_as_much_and_its_numbers_come_back(
    spoken, tmp_path, monkeypatch
):
    call(["prosody.py", str(spoken / "m.jsonl"), "--out", str(tmp_path / "p")], monkeypatch)
    corpus = prosody.Prosody(tmp_path / "p")
    lengths = [NAMES[numbers[3]] for n in range(12) for word, numbers in corpus[n] if word]
    assert len(lengths) == 72 and {name.split("_")[0] for name in lengths} == {"length"}
    assert max(lengths.count(name) for name in set(lengths)) <= 8, "72 lengths fall into 16 bins"
    samples = audio.load(spoken / "3.flac")
    again = prosody.numbered(
        measured(samples, corpus.entries[3]["words"]), prosody.read_edges(tmp_path / "p")
    )
    assert again == corpus[3]
    assert again.text() == LINE
    assert prosody.is_prosody(tmp_path / "p")
    assert not prosody.is_prosody(spoken)

    # Another corpus is measured in the bins of this one.
    call(
        [
            "prosody.py", str(spoken / "m.jsonl"), "--bins", str(tmp_path / "p"),
            "--out", str(tmp_path / "q"),
        ],
        monkeypatch,
    )
    assert prosody.Prosody(tmp_path / "q").meta["codebook_sha256"] == corpus.meta["codebook_sha256"]


def test_measuring_goes_on_after_a_stop_and_ends_with_the_same_bytes(spoken, tmp_path, monkeypatch):
    words = ["prosody.py", str(spoken / "m.jsonl"), "--out"]
    call([*words, str(tmp_path / "straight")], monkeypatch)
    monkeypatch.setattr(prosody, "PIECE", 5)
    measure, count = prosody.measured, []

    def dying(*given):
        count.append(1)
        if len(count) == 8:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(prosody, "measured", dying)
    with pytest.raises(KeyboardInterrupt):
        call([*words, str(tmp_path / "p")], monkeypatch)
    call([*words, str(tmp_path / "p")], monkeypatch)
    assert len(count) == 8 + 7, "the first five were kept"
    for name in ("manifest.jsonl", "codebook.json", "codebook.safetensors"):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not (tmp_path / "p.pieces").exists()


def test_a_chat_hears_a_clip_with_word_times_as_training_did(spoken, tmp_path, monkeypatch):
    entry = json.loads((spoken / "m.jsonl").read_text().splitlines()[0])
    entry["audio"] = str(spoken / entry["audio"])
    entry["words"] = [[word, 0.9 * begin, 0.9 * end] for word, begin, end in entry["words"]]
    (tmp_path / "m.jsonl").write_text(json.dumps(entry) + "\n")
    call(["prosody.py", str(spoken / "m.jsonl"), "--out", str(tmp_path / "bins")], monkeypatch)
    words = ["prosody.py", str(tmp_path / "m.jsonl"), "--bins", str(tmp_path / "bins")]
    call([*words, "--out", str(tmp_path / "p")], monkeypatch)
    ears, samples = prosody.Ears(tmp_path / "bins"), audio.load(entry["audio"])
    assert listen.hear(ears, samples, LINE, entry["words"]) == prosody.Prosody(tmp_path / "p")[0]
    assert listen.hear(ears, samples, LINE) != prosody.Prosody(tmp_path / "p")[0]


@pytest.mark.parametrize("script", ["prosody.py", "whisper.py"])
def test_a_clip_that_cannot_be_opened_is_told_before_the_first_is_worked_on(
    script, spoken, tmp_path, monkeypatch
):
    entries = (spoken / "m.jsonl").read_text().splitlines()
    (tmp_path / "bad.wav").write_text("no sound")
    entries = [
        json.dumps(json.loads(line) | {"audio": str(spoken / json.loads(line)["audio"])})
        for line in entries
    ] + [json.dumps({"audio": "bad.wav", "text": "a"})]
    (tmp_path / "m.jsonl").write_text("\n".join(entries))
    monkeypatch.setattr(runs, "in_pieces", lambda *given, **named: pytest.fail("it began"))
    args = Namespace(
        manifest=str(tmp_path / "m.jsonl"), bins=None, whisper=None, out=str(tmp_path / "p"),
        overwrite=False,
    )
    with pytest.raises((ValueError, OSError), match="bad.wav"):
        prosody.encode(args) if script == "prosody.py" else whisper.write_words(args, None)


@pytest.mark.parametrize(
    "seconds, said", [(0.005, "too short to hold its text"), (301, "longer than 300 s")]
)
def test_a_clip_too_short_or_too_long_is_refused(seconds, said, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(int(seconds * 16000), np.float32), 16000)
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": "hello"}\n')
    with pytest.raises(ValueError, match=f"a.wav: {said}"):
        call(["prosody.py", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "p")], monkeypatch)


def test_an_output_with_a_slash_behind_it_is_the_same_output(spoken, tmp_path, monkeypatch):
    call(["prosody.py", str(spoken / "m.jsonl"), "--out", f"{tmp_path}/p/"], monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_a_clip_without_text_is_refused_before_anything_is_measured(spoken, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", buzz(100), 16000)
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav"}\n')
    with pytest.raises(ValueError, match="has no text"):
        call(["prosody.py", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "p")], monkeypatch)
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty; wanted at least one clip"):
        call(["prosody.py", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "p")], monkeypatch)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        call(
            [
                "prosody.py", str(spoken / "m.jsonl"), "--bins", str(tmp_path / "none"),
                "--out", str(tmp_path / "p"),
            ],
            monkeypatch,
        )


def test_a_document_is_caption_text_and_speech_with_every_word_again_before_its_numbers(
    spoken, speedrun, tmp_path, monkeypatch
):
    call(["prosody.py", str(spoken / "m.jsonl"), "--out", str(tmp_path / "p")], monkeypatch)
    corpus, vocab = prosody.Prosody(tmp_path / "p"), Vocab(speedrun / "base")
    first = vocab.with_speech(vocab.size, len(NAMES), NAMES)
    vocab.speech = {
        "speech": first - 2,
        "end_speech": first - 1,
        "first_unit": first,
        "k": len(NAMES),
        "features": {"kind": "prosody"},
    }
    document = vocab.captioned(
        "a man\n", Said([("", [3]), ("no", [48, 64]), (" yes", [49])]), "", "", ends=True
    )
    names = {i: token for token, i in vocab.special.items()}
    literal = "".join(names.get(i) or vocab.decode([i]) for i in document.ids)
    assert (
        literal
        == (
            "a man\n"
            "no yes<|speech|><|speaker_3|>no<|pitch_0|><|range_0|> "
            "yes<|pitch_1|><|/speech|><|im_end|><|endoftext|>"
        )
    )
    silent = [names.get(i) for i, loss in zip(*document[:2]) if not loss]
    assert silent == ["<|speech|>", "<|/speech|>", "<|endoftext|>"], "all else bears the plain loss"
    assert set(document.loss) == {0, 1}

    heavy = [
        "".join(vocab.decode([i]) for i, loss in zip(*drawn[:2]) if loss == 8)
        for drawn in (
            documents.captioned(vocab, corpus, 0, np.random.default_rng(n), 8) for n in range(60)
        )
    ]
    caption = corpus.entries[0]["caption"]
    assert set(heavy) == {"", f"\n{caption}."}, "a caption that speech tells, alone"

    echo = vocab.captioned(
        "a man\n", Said([("", [3]), ("no", [48, 64]), (" yes", [49])]), "", "\na man", echo_loss=0
    )
    numbers = [i >= first for i, loss in zip(*echo[:2]) if loss]
    assert vocab.decode([i for i, loss in zip(*echo[:2]) if loss and i < first]) == (
        "a man\nno yes\na man"
    ), "not the words inside the speech"
    assert sum(numbers) == 4, "and all of its numbers"

    made = [
        documents.captioned(vocab, corpus, n % 12, np.random.default_rng(n)).ids for n in range(900)
    ]
    texts = [vocab.decode(ids) for ids in made]
    found = {
        "above": ["man\nanna" in text for text in texts],
        "below": [re.search(r"man\.", text) is not None for text in texts],
        "between": [text.count(LINE) == 3 for text in texts],
        "ends": [vocab.special["<|im_end|>"] in ids for ids in made],
    }
    wanted = {"above": 0.3, "below": 0.3, "between": 0.5, "ends": 0.2}
    assert {
        name: abs(np.mean(said) - wanted[name]) < 0.05 for name, said in found.items()
    } == dict.fromkeys(wanted, True)
    corpus.entries = [entry | {"caption": None} for entry in corpus.entries]
    bare = [
        vocab.decode(documents.captioned(vocab, corpus, n % 12, np.random.default_rng(n)).ids)
        for n in range(100)
    ]
    assert not any(
        text.startswith("\n") or re.search(r"\n\.", text) or "None" in text for text in bare
    ), "an entry may have no caption"
    both = [text for text, *which in zip(texts, found["below"], found["between"]) if all(which)]
    assert len(both) > 90
    assert all(
        re.search(rf"{LINE}\na (wo)?man\.", text) for text in both
    ), "the caption stands last"


@pytest.mark.parametrize(
    "words",
    [[["a", float("nan"), 1.0]], [["a", 5.0, 2.0]], [["a", -1, 2.0]], [["a", 0.0, float("inf")]]],
)
def test_word_times_that_cannot_be_are_refused(words, spoken, tmp_path, monkeypatch):
    entry = {"audio": str(spoken / "0.flac"), "text": "a", "words": words}
    (tmp_path / "m.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match='among "words"'):
        call(["prosody.py", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "p")], monkeypatch)


def test_words_behind_the_end_of_their_clip_are_told(spoken, tmp_path, monkeypatch):
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"audio": str(spoken / "0.flac"), "text": "a", "words": [["a", 50.0, 51.0]]})
        + "\n"
    )
    with pytest.raises(ValueError, match="'a' begins at 50.0 s, behind its"):
        call(["prosody.py", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "p")], monkeypatch)
    assert not (tmp_path / "p").exists()


def test_a_blank_text_is_none_and_wrong_bins_are_told_before_the_work(
    spoken, speedrun, tmp_path, monkeypatch
):
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"audio": str(spoken / "0.flac"), "text": "  "}) + "\n"
    )
    with pytest.raises(ValueError, match="has no text"):
        call(["prosody.py", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "p")], monkeypatch)
    with pytest.raises(ValueError, match="wanted prosody"):
        call(
            [
                "prosody.py", str(spoken / "m.jsonl"), "--bins", str(speedrun / "codebook"),
                "--out", str(tmp_path / "p"),
            ],
            monkeypatch,
        )
    assert not (tmp_path / "p.pieces").exists()
