"""Promises about whisper.py, on small random models beside transformers."""

import json

import numpy as np
import pytest
import soundfile
import torch

import vocab
import whisper
import whisper_model
from conftest import call

transformers = pytest.importorskip("transformers")
from transformers.generation import logits_process  # noqa: E402
from transformers.models.whisper import generation_whisper  # noqa: E402

MARKERS = [
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>",
    "<|transcribe|>", "<|notimestamps|>",
]


def folder_of(path, many, bands=80, seed=0):
    """A small random Whisper, as transformers writes it; (its folder, transformers' model)."""
    merges = vocab.train_bpe({" hello": 3, " world": 2, "ing": 2})
    tokens = vocab.LETTERS + [left + right for left, right in merges]
    ids = {token: i for i, token in enumerate(tokens)}
    special = {name: len(ids) + i for i, name in enumerate(MARKERS)}
    end, begin = special["<|endoftext|>"], special["<|startoftranscript|>"]
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=special["<|notimestamps|>"] + 1 + 1501, d_model=32, num_mel_bins=bands,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, decoder_start_token_id=begin,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() > 1 else 0.1)
    told = dict(
        no_timestamps_token_id=special["<|notimestamps|>"], is_multilingual=many,
        max_initial_timestamp_index=50,
        suppress_tokens=[
            i for i in special.values() if i not in (end, special["<|notimestamps|>"])
        ],
        begin_suppress_tokens=[ids["Ġ"], end], alignment_heads=[[0, 1], [1, 0], [1, 3]],
        decoder_start_token_id=begin, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        max_length=40,
    )
    if many:
        told |= {
            "lang_to_id": {"<|en|>": begin + 1, "<|de|>": begin + 2},
            "task_to_id": {"transcribe": special["<|transcribe|>"]},
        }
    for name, value in told.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(path)
    made = vocab.tokenizer_json(ids, merges, special)
    (path / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    return path, model


def clips_of(*seconds):
    rng = np.random.default_rng(0)
    return [
        rng.normal(0, 0.1 * (n + 1), round(16_000 * s)).astype(np.float32)
        for n, s in enumerate(seconds)
    ]


def features(clips, bands):
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands)
    return extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features


@pytest.mark.parametrize("bands", [80, 128])
def test_frames_and_the_states_of_every_block_are_those_of_transformers(bands, tmp_path):
    folder, theirs = folder_of(tmp_path, many=False, bands=bands)
    ours, clips = whisper.Whisper(folder), clips_of(1.3, 29.9, 0.5)
    mel = features(clips, bands)
    heard = torch.stack([whisper_model.log_mel(clip, bands) for clip in clips])
    assert (heard - mel).abs().max() < 1e-4
    with torch.no_grad():
        wanted = theirs.model.encoder(mel, output_hidden_states=True)
    for n, (clip, last, blocks) in enumerate(
        zip(clips, ours.states(clips), ours.states(clips, [0, 1]))
    ):
        frames = len(clip) // 320
        assert last.shape == (frames, 32) and blocks.shape == (2, frames, 32)
        assert (last - wanted.last_hidden_state[n, :frames]).abs().max() < 1e-4
        assert (blocks[0] - wanted.hidden_states[1][n, :frames]).abs().max() < 1e-4


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_transcript_has_the_ids_of_transformers(seed, many, times, tmp_path):
    """Their logits under their own rules. Random weights write anything: so every rule about
    times is met.
    """
    folder, theirs = folder_of(tmp_path, many, seed=seed)
    ours = whisper.Whisper(folder)
    clips = clips_of(1.0, 2.5, 7.0, 0.3)
    made = theirs.generation_config
    end, written = ours.vocab.eos, ours.write(clips, times, limit=20)
    for n, clip in enumerate(clips):
        states = theirs.model.encoder(features([clip], 80))
        ids = ours.prompts(ours.model.decoder.hear(states.last_hidden_state), 1, times)
        first = ids.shape[1]
        # No time behind <|notimestamps|>.
        masked = made.suppress_tokens + (
            [] if times else [*range(ours.times, ours.config.vocab_size)]
        )
        rules = [
            logits_process.SuppressTokensLogitsProcessor(masked),
            logits_process.SuppressTokensAtBeginLogitsProcessor(made.begin_suppress_tokens, first),
        ]
        if times:
            rules.append(logits_process.WhisperTimeStampLogitsProcessor(made, begin_index=first))
        while ids.shape[1] < first + 20 and ids[0, -1] != end:
            with torch.no_grad():
                logits = theirs(encoder_outputs=states, decoder_input_ids=ids).logits[:, -1]
            for rule in rules:
                logits = rule(ids, logits)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        assert written[n] == [i for i in ids[0, first:].tolist() if i != end], n
    assert not times or sum(i >= ours.times for ids in written for i in ids) > 4


def test_the_likeliest_language_is_taken(tmp_path):
    folder, theirs = folder_of(tmp_path, many=True)
    ours, clips = whisper.Whisper(folder), clips_of(1.0, 2.5, 7.0)
    heard = ours.model.decoder.hear(ours.model.encoder(features(clips, 80)))
    wanted = theirs.detect_language(features(clips, 80)).tolist()
    assert ours.prompts(heard, 3, times=True)[:, 1].tolist() == wanted


def test_words_begin_where_the_heads_look():
    """Three words that are looked at from frames 4, 10 and 17 on; as transformers finds the
    path.
    """
    look = torch.full((4, 25), -1.0)
    for n, (a, b) in enumerate([(0, 4), (4, 10), (10, 17), (17, 25)]):
        look[n, a:b] = 1.0
    assert whisper.warp(look.numpy()).tolist() == [0, 4, 10, 17]
    rng = np.random.default_rng(0)
    for shape in ((5, 40), (12, 9), (1, 3)):
        gain = rng.normal(size=shape)
        tokens, frames = generation_whisper._dynamic_time_warping(-gain)
        wanted = [int(frames[tokens == n].min()) for n in range(shape[0])]
        assert whisper.warp(gain).tolist() == wanted
    x = torch.from_numpy(rng.normal(size=(2, 3, 30)))
    assert torch.equal(whisper.median(x), generation_whisper._median_filter(x, 7))


def test_words_begin_when_transformers_says_that_their_tokens_do(tmp_path):
    """Of a clip of 30 seconds: where one is shorter, transformers has the heads look behind its
    end, too.
    """
    folder, theirs = folder_of(tmp_path, many=True)
    theirs.set_attn_implementation("eager")  # it alone shows where heads look
    ours, clips = whisper.Whisper(folder), clips_of(30)
    text = "hello world singing world hello"
    found = ours.words(clips[0], text)

    heard = ours.model.decoder.hear(ours.encode(clips))
    prompt = ours.prompts(heard, 1, times=False)[0].tolist()
    tokens = [ours.vocab.encode(" " + word) for word in text.split()]
    ids = torch.tensor([prompt + sum(tokens, [])])
    with torch.inference_mode():
        looked = theirs(features(clips, 80), decoder_input_ids=ids, output_attentions=True)
    made = transformers.generation.GenerateEncoderDecoderOutput(
        sequences=ids, cross_attentions=[looked.cross_attentions]
    )
    heads = theirs.generation_config.alignment_heads
    times = theirs._extract_token_timestamps(made, heads, num_input_ids=len(prompt) - 1)[0]
    edges = np.cumsum([len(prompt) - 1, *map(len, tokens)])
    assert len({begin for _, begin, _ in found}) > 2
    assert [[begin, end] for _, begin, end in found] == [
        pytest.approx(times[[a, b]].tolist(), abs=0.001) for a, b in zip(edges, edges[1:])
    ]


def test_a_manifest_gets_words_and_resumes_after_a_kill(tmp_path, monkeypatch):
    folder, _ = folder_of(tmp_path / "w", many=False)
    entries = [{"audio": f"{n}.wav", "text": "hello world hello"} for n in range(3)] + [
        {"audio": "3.wav"}
    ]
    for n, clip in enumerate(clips_of(1.0, 31.0, 2.0, 1.5)):
        soundfile.write(tmp_path / f"{n}.wav", clip, 16_000)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    command = [
        "whisper.py", "words", str(tmp_path / "m.jsonl"), "--whisper", str(folder),
        "--device", "cpu", "--dtype", "float32",
    ]
    call([*command, "--out", str(tmp_path / "straight.jsonl")], monkeypatch)
    made = [json.loads(line) for line in (tmp_path / "straight.jsonl").read_text().splitlines()]
    words = made[0]["words"]
    assert [word for word, _, _ in words] == ["hello", "world", "hello"]
    assert "words" not in made[1]
    assert "text" in made[3]
    assert all(0 <= begin <= end <= 1.0 for _, begin, end in words)
    assert all(a[2] == b[1] for a, b in zip(words, words[1:]))

    real, calls = whisper.Whisper.words, []

    def killed(self, samples, text):
        calls.append(text)
        # In the second piece of two entries.
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, samples, text)

    monkeypatch.setattr(whisper, "BATCH", 1)
    monkeypatch.setattr(whisper.Whisper, "words", killed)
    again = [*command, "--out", str(tmp_path / "again.jsonl")]
    with pytest.raises(KeyboardInterrupt):
        call(again, monkeypatch)
    monkeypatch.setattr(whisper.Whisper, "words", real)
    call(again, monkeypatch)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert len(calls) == 2 and not list(tmp_path.glob("again.jsonl.*"))

    # What is kept beside the sound is not a part of it; other sound under the same names is.
    (tmp_path / "m.jsonl").unlink()
    command[2], inside = str(tmp_path), ["--out", str(tmp_path / "inside.jsonl")]
    for change in (False, True):
        calls.clear()
        monkeypatch.setattr(whisper.Whisper, "words", killed)
        with pytest.raises(KeyboardInterrupt):
            call([*command, *inside], monkeypatch)
        monkeypatch.setattr(whisper.Whisper, "words", real)
        if change:
            soundfile.write(tmp_path / "0.wav", clips_of(0.5)[0], 16_000)
            with pytest.raises(ValueError, match="of a run with another audio"):
                call([*command, *inside], monkeypatch)
        else:
            call([*command, *inside], monkeypatch)
            (tmp_path / "inside.jsonl").unlink()


def test_words_of_another_text_do_not_stay_and_those_of_a_long_clip_do(tmp_path, monkeypatch):
    folder, _ = folder_of(tmp_path / "w", many=False)
    soundfile.write(tmp_path / "long.wav", clips_of(31.0)[0], 16_000)
    entry = {"audio": "long.wav", "text": "hello", "words": [["world", 0.0, 1.0]]}
    entries = entry, entry | {"text": "World!"}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    call(
        [
            "whisper.py", "words", str(tmp_path / "m.jsonl"), "--whisper", str(folder),
            "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "o.jsonl"),
        ],
        monkeypatch,
    )
    other, same = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert "words" not in other and same["words"] == entry["words"]


def test_what_is_no_whisper_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(ValueError, match="'hubert', wanted 'whisper'"):
        whisper.Whisper(tmp_path)
    folder, _ = folder_of(tmp_path / "w", many=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": "x"}))
    with pytest.raises(ValueError, match="got d_model = 'x', wanted a number"):
        whisper.Whisper(folder)
    with pytest.raises(FileNotFoundError, match="wanted a Hugging Face Whisper folder"):
        whisper.Whisper(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file, harm, said",
    [
        ("config", {"encoder_attention_heads": 5}, "5 heads do not share d_model = 32 evenly"),
        ("config", {"max_source_positions": 7}, "max_source_positions = 7, wanted 1500"),
        ("generation_config", {"suppress_tokens": [10**6]}, "ids that the model does not have"),
        ("generation_config", {"suppress_tokens": "no"}, "ids that the model does not have"),
        ("generation_config", {"alignment_heads": [[9, 0]]}, "heads that the model does not have"),
        ("generation_config", {"alignment_heads": 7}, "heads that the model does not have"),
    ],
)
def test_a_damaged_whisper_is_one_line(file, harm, said, tmp_path):
    folder, _ = folder_of(tmp_path, many=False)
    made = json.loads((folder / f"{file}.json").read_text())
    (folder / f"{file}.json").write_text(json.dumps(made | harm))
    with pytest.raises(ValueError, match=said):
        whisper.Whisper(folder)


def test_a_long_recording_is_written_down_window_by_window(tmp_path, monkeypatch):
    """The next window begins where the last whole segment ends."""
    folder, _ = folder_of(tmp_path, many=False)
    ours, seen = whisper.Whisper(folder), []
    hello, tick = ours.vocab.encode(" hello"), lambda s: ours.times + round(s / 0.02)
    # Another one began, and was cut off.
    script = [
        [tick(0), *hello, tick(12), tick(12.5), *hello, tick(20), tick(20)],
        [tick(1), *hello, tick(29)],
        [tick(0), *hello],
    ]

    def write(clips, times):
        seen.append(len(clips[0]) / 16_000)
        return [script[len(seen) - 1]]

    monkeypatch.setattr(ours, "write", write)
    said = ours.segments(np.zeros(16_000 * 55, np.float32))
    assert seen == [30.0, 30.0, 5.0]
    assert [(round(a, 2), round(b, 2)) for a, b, _ in said[:3]] == [(0, 12), (12.5, 20), (21, 49)]
    assert len(said) == 4 and said[3][:2] == (50, 55)

    # A segment that ends within the first second: what is behind it is read, too.
    seen.clear()
    script[:] = [[tick(0), *hello, tick(0.4), tick(0.5), *hello], [tick(0), *hello, tick(5)]]
    ours.segments(np.zeros(int(16_000 * 30.3), np.float32))
    assert seen == [30.0, 29.9]
