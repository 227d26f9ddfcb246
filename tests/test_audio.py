import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio
from conftest import ROOT, shared
from odd_audio import ODD


def sine(hertz, rate, seconds=2.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000])
def test_resampling_keeps_what_16_khz_can_carry(rate):
    y = audio.resample(sine(3000, rate), rate)
    assert len(y) == 32000 and abs(y - sine(3000, 16000))[500:-500].max() < 1e-3


def test_resampling_removes_what_16_khz_cannot_carry():
    y = audio.resample(sine(9000, 48000), 48000)[500:-500]
    assert 20 * np.log10(np.sqrt(2 * (y**2).mean()) + 1e-9) < -60


def gain(hertz, rate):
    """What is left of a sine of 1 at `hertz`, in dB, after resampling to 16 kHz; whatever
    comes out counts, at any frequency.
    """
    y = audio.resample(sine(hertz, rate), rate)[2000:-2000]
    return 20 * np.log10(np.sqrt(2 * (y.astype(np.float64) ** 2).mean()) + 1e-12)


@pytest.mark.parametrize("rate", [22050, 24000, 44100, 48000, 96000])
def test_the_passband_is_flat_to_a_tenth_of_a_decibel_and_aliases_are_60_below(rate):
    assert max(abs(gain(hertz, rate)) for hertz in (50, 500, 2000, 4000, 6000, 7000, 7200)) < 0.1
    assert (
        max(gain(hertz, rate) for hertz in np.linspace(8100, min(rate / 2 - 100, 40000), 9)) < -60
    )


def test_resampling_agrees_with_scipys_where_both_pass():
    signal = pytest.importorskip("scipy.signal")
    x = sum(sine(hertz, 48000) for hertz in (100, 1000, 3000, 6000)) / 4
    wanted = signal.resample_poly(x.astype(np.float64), 1, 3, window=("kaiser", 12.0))
    assert abs(audio.resample(x, 48000) - wanted)[500:-500].max() < 1e-2


def test_any_wav_becomes_mono_float32_at_16_khz(tmp_path):
    both = np.stack([sine(440, 44100), np.zeros(88200, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.wav", both, 44100, subtype="PCM_24")
    y = audio.load(tmp_path / "a.wav")
    assert y.dtype == np.float32
    assert y.shape == (32000,)
    assert abs(abs(y[1000:-1000]).max() - 0.5) < 0.01


@pytest.mark.parametrize(
    "rate, form", [(16000, "WAV"), (22050, "OGG"), (24000, "OGG"), (44100, "MP3"), (48000, "FLAC")]
)
def test_a_part_of_a_file_is_what_the_whole_holds_there(tmp_path, rate, form):
    path = tmp_path / f"a.{form.lower()}"
    soundfile.write(
        path, 0.3 * np.random.default_rng(0).standard_normal((32 * rate + 17, 1)), rate,
        format=form, subtype="OPUS" if rate == 24000 else None,
    )
    whole, recording = audio.load(path), audio.Recording(path)
    assert len(recording) == len(whole)
    for a, b in [
        (0, 1),
        (0, 20000),
        (31999, 32001),
        (492345, 500000),
        (490001, len(whole)),
        (511000, len(whole) + 999),
    ]:
        assert len(recording[a:b]) == min(b, len(whole)) - a
        assert abs(recording[a:b] - whole[a:b]).max() < 1e-5
    assert np.array_equal(recording[:], whole)
    with pytest.raises(ValueError, match="ends after 32.0 s, before the stretch"):
        audio.load(path, 40 * 16000, 41 * 16000)


@pytest.mark.parametrize(
    "name, content",
    [
        ("gone.wav", None),
        ("empty.wav", b""),
        ("text.wav", b"hello world" * 100),
        ("half.flac", b"fLaC" + bytes(50)),
    ],
)
def test_what_is_not_audio_is_refused_in_one_line_that_names_it(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        audio.load(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_every_odd_file_gives_what_the_table_says_quickly_and_in_little_memory():
    """Samples at 16 kHz, or refused in one line that names the file; in a process of its own,
    so that its memory can be told.
    """
    folder = shared("odd_audio")
    script = (
        "import sys, json, time, pathlib; sys.path[:0] = sys.argv[1:]; "
        "import audio; from memory import peak\n"
        "said, start = {}, peak()\n"
        "for name in sys.stdin.read().split():\n"
        "  began = time.time()\n"
        "  try:\n"
        "    got = len(audio.load(name))\n"
        "    part = len(audio.Recording(name)[1:]) if got > 1 else 0\n"
        "    assert part == got - 1, (name, got, part)\n"
        "  except (ValueError, OSError) as e: got = str(e)\n"
        "  said[name] = got, time.time() - began\n"
        "print(json.dumps([said, peak() - start]))"
    )
    files = sorted(str(f) for f in folder.rglob("*") if f.suffix.lower() in audio.AUDIO | {".m4a"})
    said, memory = json.loads(
        subprocess.run(
            [sys.executable, "-c", script, str(ROOT), str(ROOT / "tests")],
            input="\n".join(files),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    got = {
        str(Path(name).relative_to(folder)): value if isinstance(value, int) else "refused"
        for name, (value, _) in said.items()
    }
    assert got == ODD and len(got) > 80
    for name, (value, seconds) in said.items():
        assert seconds < 1
        assert isinstance(value, int) or "\n" not in value and Path(name).name in value, (
            name, value, seconds,
        )
    assert memory < 200, f"{memory:.0f} MB above start-up"


def test_a_sentence_in_twelve_encodings_of_16_bits_and_more_gives_nearly_the_same_units(speedrun):
    """With the HuBERT of a whole speedrun the twelve agree to the unit, and the two of 8 bits,
    left out here, differ by 13 and 19 % (seed 0).
    """
    from evaluate import edit_distance
    from tokenize_audio import AudioTokenizer

    files = sorted(f for f in shared("odd_audio/uberi").glob("audio-*") if "8-bit" not in f.name)
    ears = AudioTokenizer(speedrun / "codebook")
    first, *others = [ears(audio.load(f))[0].tolist() for f in files]
    assert len(others) == 11
    assert all(edit_distance(units, first) <= 0.02 * len(first) for units in others)


def test_frames_are_samples_over_320_rounded_down():
    for n, frames in ((16000, 50), (15999, 49), (320, 1), (319, 0), (190800, 596)):
        assert audio.mfcc(np.random.default_rng(0).normal(size=n).astype(np.float32)).shape == (
            frames,
            39,
        )


def test_mfcc_of_a_louder_clip_is_the_same():
    x = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    assert abs(audio.mfcc(x) - audio.mfcc(0.1 * x)).max() < 0.01


def test_manifests_and_known_layouts_are_read(tmp_path):
    libri = tmp_path / "libri" / "84" / "121"
    libri.mkdir(parents=True)
    soundfile.write(libri / "84-121-0000.flac", sine(100, 16000, 0.1), 16000)
    (libri / "84-121.trans.txt").write_text("84-121-0000 GO DO YOU HEAR\n")
    [entry] = audio.read_manifest(tmp_path / "libri")
    assert entry["text"] == "go do you hear" and entry["audio"].endswith("84-121-0000.flac")
    lj = tmp_path / "lj" / "wavs"
    lj.mkdir(parents=True)
    soundfile.write(lj / "LJ001-0001.wav", sine(100, 16000, 0.1), 16000)
    (tmp_path / "lj" / "metadata.csv").write_text("LJ001-0001|In 1455|In fourteen fifty-five\n")
    assert audio.read_manifest(tmp_path / "lj")[0]["text"] == "In fourteen fifty-five"
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "lj/wavs/LJ001-0001.wav"}) + "\n")
    assert audio.read_manifest(tmp_path / "m.jsonl")[0]["audio"] == str(lj / "LJ001-0001.wav")
    (tmp_path / "bad.jsonl").write_text('{"text": "no audio"}\n')
    with pytest.raises(ValueError, match="entry 1"):
        audio.read_manifest(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="no audio files"):
        (tmp_path / "none").mkdir()
        audio.read_manifest(tmp_path / "none")


def test_a_stretch_of_time_gives_the_runs_that_lie_mostly_inside():
    units = np.array([5, 6, 7, 8])
    durations = np.array([10, 10, 10, 10])  # 0.2 s each at 50 frames a second
    assert audio.between(units, durations, 0.0, 0.2, 50).tolist() == [5]
    assert audio.between(units, durations, 0.25, 0.65, 50).tolist() == [6, 7]
    assert [
        u
        for a in (0, 0.3, 0.5)
        for u in audio.between(units, durations, a, {0: 0.3, 0.3: 0.5, 0.5: 0.8}[a], 50)
    ] == [5, 6, 7, 8]


@pytest.mark.parametrize("word", ['["hi", "a", "b"]', '"hi"', '["hi", 0.1]', "[3, 0.1, 0.2]"])
def test_word_times_of_the_wrong_form_are_shown(word, tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"audio": "a.wav", "words": [["a", 0, 0.5]]}\n{"audio": "a.wav", "words": ['
        + word
        + "]}\n"
    )
    with pytest.raises(ValueError, match='entry 2: got .* among "words", wanted'):
        audio.read_manifest(tmp_path / "m.jsonl")


def test_linked_folders_are_read_and_a_link_in_a_circle_is_named(tmp_path):
    for folder in ("elsewhere", "corpus"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / f"{folder}.wav", np.zeros(1000), 16000)
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    assert [Path(entry["audio"]).name for entry in audio.read_manifest(tmp_path / "corpus")] == [
        "corpus.wav",
        "elsewhere.wav",
    ]
    (tmp_path / "corpus/circle").symlink_to(tmp_path / "corpus")
    with pytest.raises(ValueError, match="circle: a link to a folder that it is in"):
        audio.read_manifest(tmp_path / "corpus")


@pytest.mark.parametrize("rate", [1, 999, 2147483647])
def test_a_header_with_an_absurd_rate_is_refused_at_once(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), 16000)
    raw = bytearray((tmp_path / "a.wav").read_bytes())
    raw[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(raw)
    for read in (audio.load, audio.Recording):
        with pytest.raises(ValueError, match="samples a second, wanted 1000 to 1000000|not audio"):
            read(tmp_path / "a.wav")


def test_samples_that_are_no_sound_are_refused(tmp_path):
    for bad in (1e20, math.nan):
        soundfile.write(tmp_path / "a.wav", np.array([0.1, bad, 0.2] * 200), 16000, "FLOAT")
        with pytest.raises(ValueError, match="samples that are no sound"):
            audio.load(tmp_path / "a.wav")


def test_an_index_of_units_that_is_cut_is_named(speedrun, tmp_path):
    shutil.copytree(speedrun / "units", tmp_path / "u")
    (tmp_path / "u/index.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="index.npy: damaged"):
        audio.Units(tmp_path / "u")
    np.save(tmp_path / "u/index.npy", np.zeros(0, int))
    with pytest.raises(ValueError, match="index, units and manifest disagree"):
        audio.Units(tmp_path / "u")


@pytest.mark.parametrize("form", ["wav", "aiff", "au", "mp3", "w64"])
def test_a_recording_that_was_cut_off_is_refused_whole_and_in_parts(form, tmp_path):
    path = tmp_path / f"a.{form}"
    soundfile.write(path, np.sin(np.arange(320_000) / 20) * 0.3, 16_000)
    assert len(audio.load(path)) >= 320_000
    with open(path, "r+b") as file:
        file.truncate(int(0.6 * path.stat().st_size))
    with pytest.raises(ValueError, match="ends after 1[12].. s, though its header promises 20.0"):
        audio.load(path)


def test_a_folder_with_audio_that_cannot_be_read_says_so_and_one_file_is_a_corpus(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), 16_000)
    assert audio.read_manifest(tmp_path / "a.wav") == [{"audio": str(tmp_path / "a.wav")}]
    (tmp_path / "b.m4a").write_bytes(b"x")
    with pytest.raises(ValueError, match="b.m4a: not audio that soundfile reads; convert it"):
        audio.read_manifest(tmp_path)


def test_words_that_lack_a_part_of_the_text_are_refused():
    entry = {"audio": "a.wav", "text": "What's it, then?", "words": [["whats", 0, 1], ["IT", 1, 2]]}
    assert "wanted the times of all of its words" in audio.wrong_words(entry, 50_000)
    entry["words"].append(["then", 2, 3])
    assert audio.wrong_words(entry, 50_000) == ""
    assert "'then' begins at 2 s, behind its 1.88 s" in audio.wrong_words(entry, 30_000)


def test_what_lies_in_a_hidden_folder_is_not_read(tmp_path):
    for name in ("a.wav", ".trash/b.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.zeros(400), 16000)
    assert [Path(entry["audio"]).name for entry in audio.read_manifest(tmp_path)] == ["a.wav"]


def test_raw_samples_without_a_header_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="not audio that soundfile reads"):
        audio.load(tmp_path / "a.raw")


@pytest.mark.parametrize("name, value, shown", [("text", "null", "None"), ("caption", "5", "5")])
def test_a_text_that_is_no_string_is_named_before_anything_is_encoded(
    name, value, shown, tmp_path
):
    (tmp_path / "m.jsonl").write_text(
        f'{{"audio": "a.wav", "caption": null}}\n{{"audio": "b.wav", "{name}": {value}}}\n'
    )
    with pytest.raises(ValueError, match=f"entry 2: got {name} = {shown}"):
        audio.read_manifest(tmp_path / "m.jsonl")


def test_an_odd_rate_gets_filters_that_are_nearly_those_of_its_own_phases():
    up, down = audio.ratio(44101, audio.SAMPLE_RATE)
    x = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    cut = audio.cut_off(up, down)
    reach = int(np.ceil(audio.CROSSINGS / cut))
    made, padded = audio.resample(x, 44101), np.pad(x, (reach, reach + down))
    for n in (3, 500, 1200):
        time = n * down / up
        (exact,) = audio.phases(np.array([time - int(time)]), 2 * reach + 1, reach, cut)
        assert abs(made[n] - (padded[int(time) : int(time) + 2 * reach + 1] * exact).sum()) < 2e-5


def test_every_feature_of_a_clip_has_mean_0_and_variance_1():
    features = audio.mfcc(
        np.random.default_rng(0).standard_normal(32000).astype(np.float32)
        * np.linspace(0.1, 1, 32000, dtype=np.float32)
    )
    assert abs(features.mean(0)).max() < 1e-4 and abs(features.std(0) - 1).max() < 0.05


def test_the_way_to_convert_a_file_does_not_write_over_it(tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(ValueError, match=r"ffmpeg -i a\.wav .* a_16k\.wav"):
        audio.load(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["metadata.csv", "1-2.trans.txt"])
def test_transcripts_that_are_not_utf_8_are_named(name, tmp_path):
    soundfile.write(tmp_path / "1-2-3.wav", sine(100, 16000), 16000)
    (tmp_path / name).write_bytes(b"1-2-3|\xff|\xff 1-2-3 \xff\n")
    with pytest.raises(ValueError, match=f"{name}: not UTF-8"):
        audio.read_manifest(tmp_path)


def test_a_corpus_of_no_units_is_empty_and_not_a_fault(tmp_path):
    for name in ("units.bin", "durations.bin"):
        (tmp_path / name).touch()
        assert audio.mapped(tmp_path / name).tolist() == []
