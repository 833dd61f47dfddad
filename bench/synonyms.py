"""The black-box synonym watermark on book excerpts: how much it changes, how surely it is found, what it survives.

    python bench/synonyms.py --data ../shared/data --json bench/results/synonyms.json

Excerpts of 100 to 400 words of two books on which the bundled models were not trained. The synonyms are the dictionary
of this file, groups of words of one form written down for this purpose: a small one, not a thesaurus, and ignorant of
senses ("kind" the noun gets the synonyms of the adjective). Four ways to choose:

    first            the dictionary's first word that has bit 1
    ranked           the one that `tiny` finds likeliest in its sentence (`Fluency`)
    ranked, careful  the same, if it costs at most 4 nats against the word that stands there
    random           control: about as many words as `ranked` replaced, by random synonyms, without looking at bits

For each: share of words changed; surprisal in bits per byte, against the text as it was; z and the share of texts found
at a level of 0.05 and 0.001, by both detectors. On the longest excerpts, what is left after an attack without the key:
words deleted, and words that have synonyms replaced by random ones. `null` is the rate of false alarms at 0.05 over
excerpts and keys that did not mark them: the test is exact, so it lies at or below the level up to chance. Intervals
are 95 % bootstrap intervals over excerpts, Clopper-Pearson for the null (whose trials share excerpts and keys).

Tiny both ranks and measures, so its own surprisal understates what another reader would see; with `--judge` another
model measures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.stats import beta

import nextoken
from nextoken.watermark import Key
from nextoken.watermark.fluency import Fluency, Ranking
from nextoken.watermark.places import Place, put_together, taken_apart
from nextoken.watermark.synonyms import SynonymWatermark
from nextoken.watermark.word_rules import content_word
from record import write

BOOKS = ("frankenstein.txt", "the-time-machine.txt")
LENGTHS = (100, 200, 400)
MOST_LOST = 4.0
"""Nats that a careful replacement may cost."""
Synonyms: TypeAlias = dict[str, list[str]]
GROUPS = """
big large great huge vast; small little tiny; old aged ancient; new fresh novel; young youthful; good fine excellent;
bad evil wicked; happy glad joyful cheerful; sad sorrowful mournful gloomy; angry furious wrathful; quick rapid swift
fast; slow sluggish tardy; strong powerful mighty; weak feeble frail; bright brilliant radiant; dark dim dusky
obscure; beautiful lovely handsome fair; ugly hideous unsightly; strange odd curious peculiar singular; dreadful
terrible horrible frightful; gentle mild tender; fierce savage ferocious; calm quiet tranquil serene peaceful; silent
mute speechless; loud noisy; cold chilly icy; warm mild; hot burning; clear plain evident manifest; certain sure;
whole entire complete; empty vacant void; full filled; rich wealthy; poor needy; wise sage prudent; foolish silly
stupid; brave bold courageous; afraid frightened scared; kind gentle benevolent; cruel brutal merciless; proud
haughty; humble modest lowly; eager keen ardent; tired weary fatigued; ill sick unwell; dead lifeless; deep profound;
high tall lofty; low deep; wide broad; narrow thin; thick dense; sharp keen; sweet pleasant agreeable; bitter harsh;
important weighty; necessary needful; possible likely; different various diverse; similar alike; equal same; distant
remote far; immense enormous vast; miserable wretched unhappy; delightful charming pleasant; wonderful marvellous
astonishing; sudden abrupt; constant continual perpetual; eternal everlasting endless; lonely solitary; secret hidden
concealed; visible apparent; perfect faultless; pale wan pallid; faint feeble; pure clean; rude rough coarse; smooth
even; house dwelling home; room chamber apartment; road path way; street lane; journey voyage trip; country land
nation; city town; village hamlet; forest wood; mountain hill; river stream; sea ocean; sky heaven; earth world globe;
fire flame blaze; light glow radiance; shadow shade; darkness gloom obscurity; night evening; morning dawn; hour time;
moment instant; period time age; beginning start; end close conclusion; story tale narrative; letter note epistle;
book volume; word term; idea notion thought; thought reflection; opinion view judgment; reason cause; purpose aim
object; desire wish longing; hope expectation; fear dread terror; horror terror dread; joy delight gladness; happiness
felicity bliss; grief sorrow sadness; misery wretchedness distress; pain anguish agony; anger rage fury; hatred
loathing; love affection; pity compassion; courage bravery valour; strength force power; danger peril hazard; enemy
foe adversary; friend companion comrade; man fellow; child infant; father parent; creature being; animal beast brute;
stranger foreigner; crowd throng multitude; people folk persons; face countenance visage; voice tone; sound noise;
silence stillness quiet; sight view spectacle; look glance gaze; appearance aspect look; form shape figure; manner way
fashion; kind sort; part portion share; piece bit fragment; place spot; side edge; effort attempt endeavour; labour
toil work; task duty; help aid assistance; gift present; money cash; chance opportunity; fate destiny lot; crime
offence; guilt blame; murderer killer; death decease; disease illness malady; remedy cure; change alteration; event
incident occurrence; discovery finding; knowledge learning; science learning; machine engine apparatus; instrument
tool; door gate; begin start commence; end finish; help aid assist; show display exhibit; see behold perceive; look
gaze; hear listen; speak talk; say remark; tell relate; ask inquire; answer reply respond; think believe suppose; know
understand; want desire wish; love adore; hate detest; get obtain procure; give grant bestow; take seize; keep retain;
leave quit depart; arrive come; go proceed; run hasten; walk stroll; return revert; seek search; find discover; hide
conceal; build construct; destroy ruin; break shatter; kill slay; die perish expire; live dwell reside; remain stay
continue; try attempt endeavour; allow permit; forbid prohibit; hope trust; fear dread; rest repose; sleep slumber;
endure bear; began started commenced; ended finished; helped aided assisted; showed displayed exhibited; saw beheld
perceived; looked gazed; spoke talked; said remarked; told related; asked inquired; answered replied responded;
believed supposed; understood knew; wanted desired wished; loved adored; hated detested; got obtained procured; gave
granted bestowed; took seized; kept retained; left quitted; arrived came; went proceeded; ran hastened hurried; walked
strolled; sought searched; found discovered; hid concealed; built constructed; destroyed ruined; broke shattered;
killed slew; died perished expired; lived dwelt resided; remained stayed continued; tried attempted endeavoured;
allowed permitted; trembled shook quivered; wept cried; smiled grinned; shouted cried yelled; whispered murmured;
perceived noticed observed; observed noticed remarked; thought considered reflected; felt experienced; resolved
determined decided; appeared seemed; happened occurred; approached neared; entered penetrated; followed pursued;
escaped fled; fell dropped; rose ascended; sat rested; stood paused; turned revolved; threw flung cast; pulled drew
dragged; pushed thrust shoved; held grasped clutched; opened unclosed; closed shut; filled stuffed; covered veiled;
surrounded encircled; increased grew; vanished disappeared; received accepted; expected awaited; remembered recalled
recollected; forgot neglected; learned discovered; beginning starting commencing; helping aiding assisting; showing
displaying; seeing beholding; looking gazing; speaking talking; asking inquiring; thinking reflecting considering;
wishing desiring; giving granting; taking seizing; keeping retaining; running hastening hurrying; walking strolling;
seeking searching; finding discovering; hiding concealing; dying perishing; living dwelling residing; remaining
staying; trying attempting endeavouring; trembling shaking quivering; eyes orbs; tears drops; words terms; thoughts
ideas reflections; feelings emotions sentiments; friends companions comrades; men fellows; children infants; creatures
beings; animals beasts brutes; days times; hours times; moments instants; years seasons; houses dwellings; rooms
chambers apartments; trees woods; mountains hills; rivers streams; sounds noises; quickly rapidly swiftly speedily;
slowly gradually; suddenly abruptly; quietly calmly silently; softly gently; loudly noisily; clearly plainly
distinctly; certainly surely undoubtedly; perhaps maybe possibly; nearly almost; entirely wholly completely totally
utterly; greatly vastly; extremely exceedingly; truly really; merely simply; frequently often repeatedly; seldom
rarely; immediately instantly directly; presently shortly; finally lastly eventually; carefully cautiously; easily
readily; sadly mournfully; gladly cheerfully joyfully; strangely oddly curiously; probably likely; scarcely hardly
barely; continually constantly perpetually
"""


def dictionary() -> Synonyms:
    """Each word's synonyms, in the order of its groups."""
    found: Synonyms = {}
    for group in GROUPS.split(";"):
        words = group.split()
        for word in words:
            found.setdefault(word, []).extend(other for other in words if other != word)
    return {word: list(dict.fromkeys(others)) for word, others in found.items() if others}


def excerpts(folder: Path, length: int, count: int) -> list[str]:
    """`count` excerpts of `length` words, half of them from each book, evenly spread, without overlap."""
    found = []
    for book in BOOKS:
        words, gaps = taken_apart((folder / "books" / book).read_text(encoding="utf-8"))
        each = count // len(BOOKS)
        step = (len(words) - 2000) // each
        for at in range(1000, 1000 + step * each, step):
            found.append(put_together(words[at : at + length], ["", *gaps[at + 1 : at + length], ""]))
    return found


def interval(values: Sequence[float]) -> list[float]:
    """95 % bootstrap interval of the mean."""
    random, values = np.random.default_rng(0), np.asarray(values)
    means = values[random.integers(0, len(values), (2000, len(values)))].mean(1)
    return [round(float(x), 4) for x in np.percentile(means, [2.5, 97.5])]


def replaced_at_random(text: str, synonyms: Synonyms, random: np.random.Generator, share: float) -> str:
    """Each word with synonyms replaced with this probability by one of them."""
    words, gaps = taken_apart(text)
    for index in range(len(words)):
        others = synonyms.get(words[index]) if content_word(Place(words, gaps, index, words[index])) else None
        if others and random.random() < share:
            words[index] = others[random.integers(len(others))]
    return put_together(words, gaps)


def words_deleted(text: str, random: np.random.Generator, share: float) -> str:
    words, gaps = taken_apart(text)
    kept = [index for index in range(len(words)) if random.random() >= share]
    return put_together([words[index] for index in kept], [*[gaps[index] for index in kept], gaps[-1]])


def bits_per_byte(model: Any, texts: Sequence[str]) -> np.ndarray:
    read = nextoken.read(model, list(texts), top=0, progress=False)
    offsets, surprisals = read.row_offsets, -read.column("logprob").astype(np.float64) / np.log(2)
    sums = [surprisals[a:b].sum() for a, b in pairwise(offsets)]
    return np.array(sums) / [len(text.encode()) for text in texts]


def found(verdicts: Sequence[Any]) -> dict[str, Any]:
    z = [float(np.nan_to_num(verdict.statistic)) for verdict in verdicts]
    return {
        "scored": round(float(np.mean([verdict.scored for verdict in verdicts])), 1),
        "z": round(float(np.mean(z)), 3),
        "z_interval": interval(z),
        **{
            f"found_at_{level}": round(float(np.mean([verdict.p_value <= level for verdict in verdicts])), 3)
            for level in (0.05, 0.001)
        },
    }


Made: TypeAlias = tuple[list[str], list[SynonymWatermark], list[float]]
"""Texts, the marks that are in them, and the share of words changed in each."""


def marked(texts: Sequence[str], keys: Sequence[Key], synonyms: Synonyms, ranking: Ranking | None) -> Made:
    marks = [SynonymWatermark(key, synonyms, ranking=ranking) for key in keys]
    done = [mark.mark(text) for mark, text in zip(marks, texts, strict=True)]
    return [one.text for one in done], marks, [len(one.replaced) / one.words for one in done]


def control(texts: Sequence[str], keys: Sequence[Key], synonyms: Synonyms, shares: Sequence[float]) -> Made:
    """As large a share of words replaced, without looking at bits."""
    random, made, changed = np.random.default_rng(5), [], []
    for text, share in zip(texts, shares, strict=True):
        words, gaps = taken_apart(text)
        able = sum(w in synonyms and content_word(Place(words, gaps, i, w)) for i, w in enumerate(words))
        made.append(replaced_at_random(text, synonyms, random, share * len(words) / max(able, 1)))
        changed.append(float(np.mean([a != b for a, b in zip(words, taken_apart(made[-1])[0], strict=True)])))
    return made, [SynonymWatermark(key, synonyms) for key in keys], changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--texts", type=int, default=24, help="excerpts of each length")
    parser.add_argument("--judge", default="tiny", help="the model that measures surprisal")
    parser.add_argument("--json", default="bench/results/synonyms.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    synonyms, tiny, judge = dictionary(), nextoken.load("tiny"), nextoken.load(arguments.judge)
    keys = [Key(f"a key of the benchmark, {number}") for number in range(arguments.texts)]
    rankings = {"first": None, "ranked": Fluency(tiny), "ranked, careful": Fluency(tiny, most_lost=MOST_LOST)}
    rows, attacks = [], []
    each = float(np.mean([len(others) for others in synonyms.values()]))
    print(f"{len(synonyms)} words with {each:.2f} synonyms on average")
    for length in LENGTHS:
        texts = excerpts(arguments.data, length, arguments.texts)
        before, shares = bits_per_byte(judge, texts), [0.0] * len(texts)
        for way in [*rankings, "random"]:
            begun = time.process_time()
            if way == "random":
                made, marks, changed = control(texts, keys, synonyms, shares)
            else:
                made, marks, changed = marked(texts, keys, synonyms, rankings[way])
            seconds = time.process_time() - begun
            if way == "ranked":
                shares = changed
                # No candidate is forbidden, so the places that have one are the dictionary's to tell.
                marks = [SynonymWatermark(key, synonyms) for key in keys]
            gained = bits_per_byte(judge, made) - before
            row = {
                "words": length,
                "way": way,
                "texts": len(texts),
                "changed": round(float(np.mean(changed)), 4),
                "bits_per_byte_before": round(float(before.mean()), 4),
                "bits_per_byte_gained": round(float(gained.mean()), 4),
                "gained_interval": interval(gained.tolist()),
                "seconds_per_text": round(seconds / len(texts), 2),
                "fast": found([mark.detect(text) for mark, text in zip(marks, made, strict=True)]),
                "precise": found([mark.detect_precisely(text) for mark, text in zip(marks, made, strict=True)]),
            }
            rows.append(row)
            shown(row)
            if length == LENGTHS[-1] and way == "ranked":
                attacks = attacked(made, marks, synonyms)
    null = false_alarms(excerpts(arguments.data, LENGTHS[0], arguments.texts), synonyms)
    print("without a mark", null)
    told = {"words": len(synonyms), "synonyms_each": round(each, 2)}
    figures = {"dictionary": told, "judge": arguments.judge, "rows": rows, "attacks": attacks, "null": null}
    write(arguments.json, figures)


def attacked(made: Sequence[str], marks: Sequence[SynonymWatermark], synonyms: Synonyms) -> list[dict[str, Any]]:
    """Both detectors after each attack, and the z that theory leaves: (1 - q)^1.5 where words are deleted."""
    ways: dict[str, tuple[Callable[[str, np.random.Generator, float], str], tuple[float, ...]]] = {
        "delete": (words_deleted, (0.0, 0.1, 0.2, 0.4)),
        "substitute": (lambda text, random, share: replaced_at_random(text, synonyms, random, share), (0.25, 0.5, 1.0)),
    }
    rows = []
    for name, (attack, shares) in ways.items():
        for share in shares:
            random = np.random.default_rng(7)
            texts = [attack(text, random, share) for text in made]
            row = {
                "attack": name,
                "share": share,
                "fast": found([mark.detect(text) for mark, text in zip(marks, texts, strict=True)]),
                "precise": found([mark.detect_precisely(text) for mark, text in zip(marks, texts, strict=True)]),
            }
            rows.append(row)
            print(f"    {name:10} {share:4.0%}  fast z {row['fast']['z']:5.2f}  precise z {row['precise']['z']:5.2f}  "
                  f"found at 0.001 {row['precise']['found_at_0.001']:.0%}", flush=True)  # fmt: skip
    return rows


def false_alarms(texts: Sequence[str], synonyms: Synonyms, keys: int = 25) -> dict[str, Any]:
    """How often p <= 0.05 under keys that marked nothing."""
    result: dict[str, Any] = {"trials": len(texts) * keys}
    marks = [SynonymWatermark(Key(f"a key that marked nothing, {number}"), synonyms) for number in range(keys)]
    for name in ("detect", "detect_precisely"):
        alarms = sum(getattr(mark, name)(text).p_value <= 0.05 for mark in marks for text in texts)
        n = len(texts) * keys
        low = float(beta.ppf(0.025, alarms, n - alarms + 1)) if alarms else 0.0
        result[name] = {
            "rate": round(alarms / n, 4),
            "interval": [round(low, 4), round(float(beta.ppf(0.975, alarms + 1, n - alarms)), 4)],
        }
    return result


def shown(row: dict[str, Any]) -> None:
    fast, precise = row["fast"], row["precise"]
    print(
        f"{row['words']:4} {row['way']:16} changed {row['changed']:5.1%} {row['bits_per_byte_gained']:+.3f} bits/byte  "
        f"fast z {fast['z']:5.2f} ({fast['found_at_0.05']:.0%})  precise z {precise['z']:5.2f} "
        f"({precise['found_at_0.05']:.0%}, {precise['found_at_0.001']:.0%})  {row['seconds_per_text']:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
