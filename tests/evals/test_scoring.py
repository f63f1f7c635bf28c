import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.cli import eval_run
from dsv3.data.chat_template import render_chat
from dsv3.errors import ConfigError, DataError
from dsv3.evals.answerer import Answerer
from dsv3.evals.scoring import EngineAnswerer, rolling_windows
from dsv3.evals.tasks import TASKS
from dsv3.evals.token_scores import ScoredText, score_texts
from dsv3.infer.loaded import load

HEADER = "In the beginning there was a word. "
PAIRS = [
    (HEADER + "The word was", " with us"),
    (HEADER + "The word was", " a word, and"),
    (HEADER + "The word was", " with us and so was the world"),
    (HEADER + "Was there", " a beginning"),
    ("", "the word"),
    ("The word ", "was"),
    ("", HEADER),
    (HEADER, "?"),
    (HEADER * 4, " beginning"),
]


@pytest.fixture(scope="module")
def plain(scored_folder):
    return load(scored_folder, plain=True, device="cpu")


@pytest.fixture(scope="module")
def answerer(scored_model):
    return EngineAnswerer(scored_model)


@pytest.fixture(scope="module")
def runner(scored_folder):
    """One that no engine uses."""
    return load(scored_folder, device="cpu").runner


def logprob_of(plain, tokens, *, scored):
    """The last `scored` tokens, by the model that trains, without cache, in one piece."""
    logits = plain.model.logits(plain.model(TokenBatch.from_sequences([tokens[:-1]])).hidden)
    logprobs = logits.double().log_softmax(-1)[-scored:]
    targets = torch.tensor(tokens[-scored:])
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


def test_it_answers_as_evaluations_ask(answerer):
    assert isinstance(answerer, Answerer)


@torch.inference_mode()
def test_a_continuation_is_worth_what_the_model_that_trains_gives_its_tokens(answerer, plain):
    for (context, continuation), found in zip(PAIRS, answerer.continuations(PAIRS), strict=True):
        before = [plain.config.bos_token_id, *plain.tokenizer.encode(context.rstrip())]
        whole = [plain.config.bos_token_id, *plain.tokenizer.encode(context + continuation)]
        cut = max(0, len(whole) - 1 - plain.config.max_position_embeddings)
        logprob, is_greedy = logprob_of(plain, whole[cut:], scored=len(whole) - len(before))
        assert found.logprob == pytest.approx(logprob, abs=1e-4)
        assert (found.is_greedy, found.num_tokens) == (is_greedy, len(whole) - len(before))
        assert found.num_cut == cut


def test_greedy_is_what_the_model_says_by_itself(scored_model):
    ids = scored_model.prompt_ids(HEADER)
    for _ in range(4):
        ids.append(int(scored_model.logits(ids)[-1].argmax()))
    texts = [ScoredText(tokens=ids, num_scored=4), ScoredText(tokens=[*ids[:-2], ids[-2] ^ 1, ids[-1]], num_scored=4)]
    with scored_model.streams.engine.lend_pages(len(ids), most_tokens=96) as pages:
        scores = score_texts(scored_model.runner, texts=texts, pages=pages, page_tokens=16)
    assert [score.is_greedy for score in scores] == [True, False]


@given(order=st.permutations(range(len(PAIRS))), count=st.integers(1, len(PAIRS)))
@settings(max_examples=15)
def test_order_and_company_change_no_score(answerer, order, count):
    alone = {pair: answerer.continuations([pair])[0] for pair in PAIRS}
    chosen = [PAIRS[place] for place in order[:count]] * 2
    assert answerer.continuations(chosen) == [alone[pair] for pair in chosen]


def test_the_model_that_trains_scores_alike(answerer, plain):
    for ours, other in zip(answerer.continuations(PAIRS), EngineAnswerer(plain).continuations(PAIRS), strict=True):
        assert ours.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_many_texts_are_scored_in_parts(answerer, monkeypatch):
    usual = answerer.continuations(PAIRS)
    monkeypatch.setattr("dsv3.evals.scoring.TEXTS_AT_ONCE", 2)
    assert answerer.continuations(PAIRS) == usual


token_lists = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@given(texts=st.lists(st.tuples(token_lists, st.integers(1, 60)), min_size=1, max_size=12), data=st.data())
@settings(max_examples=30)
def test_few_pages_and_forks_anywhere_change_no_score(runner, texts, data):
    size = data.draw(st.sampled_from([1, 2, 5, 16]), label="page_tokens")
    scored = [ScoredText(tokens=[0, *tokens], num_scored=min(most, len(tokens))) for tokens, most in texts]
    fewest = max(-(-(len(text.tokens) - 1) // size) for text in scored)
    num_pages = fewest + data.draw(st.integers(0, 80), label="more pages")
    runner.make_pages(num_pages=num_pages, page_tokens=size)
    together = score_texts(runner, texts=scored, pages=range(num_pages), page_tokens=size)
    alone = [score_texts(runner, texts=[one], pages=range(num_pages), page_tokens=size)[0] for one in scored]
    assert together == alone


def test_what_texts_share_is_read_once(scored_model, monkeypatch):
    answerer = EngineAnswerer(scored_model)
    read = []
    forward = scored_model.runner.forward

    def counted(batch, **options):
        read.append(batch.num_tokens)
        return forward(batch, **options)

    monkeypatch.setattr(scored_model.runner, "forward", counted)
    question = HEADER + "The word was"
    length = len(scored_model.prompt_ids(question))
    answerer.continuations([(question, letter) for letter in (" a", " b", " c", " d", " us")])
    assert sum(read) <= length + 5
    read.clear()
    answerer.continuations([(question, f" {letter} in the beginning") for letter in "abcdefgh"])
    longest = len(scored_model.prompt_ids(question + " a in the beginning"))
    assert sum(read) <= longest + 7 * (longest - length + 15)


def test_logits_are_made_of_few_rows_at_a_time(scored_model, monkeypatch):
    monkeypatch.setattr("dsv3.evals.token_scores.LOGITS_AT_ONCE", 3 * scored_model.config.vocab_size)
    rows = []
    logits = scored_model.runner.logits
    usual = EngineAnswerer(scored_model).rolling([HEADER * 3])
    monkeypatch.setattr(scored_model.runner, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    assert EngineAnswerer(scored_model).rolling([HEADER * 3]) == usual
    assert max(rows) == 3


@torch.inference_mode()
def test_a_long_text_is_scored_in_windows_each_token_once(answerer, plain):
    texts = ["", HEADER, HEADER * 12]
    expected = []
    for text in texts:
        tokens = [plain.config.bos_token_id, *plain.tokenizer.encode(text)]
        windows = rolling_windows(tokens, context=answerer.context)
        expected.append(sum(logprob_of(plain, list(one.tokens), scored=one.num_scored)[0] for one in windows))
    assert answerer.rolling(texts) == pytest.approx(expected, abs=1e-3)


@given(length=st.integers(0, 70), context=st.integers(2, 20))
def test_windows_are_those_of_lm_eval(length, context):
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(1, length + 1))
    theirs = [
        ([*before, *predicted], len(predicted))
        for before, predicted in map(
            utils.make_disjoint_window,
            utils.get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=context, context_len=1),
        )
    ]
    ours = rolling_windows([0, *tokens], context=context)
    assert [(list(one.tokens), one.num_scored) for one in ours] == theirs


def test_continuations_that_cannot_be_scored_are_named(answerer):
    with pytest.raises(DataError, match="no token of its own"):
        answerer.continuations([("a", "")])
    with pytest.raises(DataError, match="rolling"):
        answerer.continuations([("a", HEADER * 12)])


def test_answers_are_those_that_each_prompt_gets_alone(answerer, scored_model):
    prompts = [HEADER, "The word", HEADER + "The", "你好", ""] * 8
    stops = [[], ["e"], ["a", "\n"], [" "], []] * 8
    most = [5, 20, 12, 8, 3] * 8
    alone = [
        scored_model.generate(prompt, temperature=0.0, stop=stop, max_tokens=count)
        for prompt, stop, count in zip(prompts[:5], stops[:5], most[:5], strict=True)
    ]
    assert answerer.generate(prompts, stops=stops, max_tokens=most) == alone * 8
    assert any(alone)


def test_a_long_prompt_is_cut_at_its_beginning(answerer, scored_model):
    ids = scored_model.prompt_ids(HEADER * 12)
    [answer] = answerer.generate([HEADER * 12], stops=[[]], max_tokens=[10])
    assert answer == scored_model.generate(ids[-(answerer.context - 10) :], temperature=0.0, max_tokens=10)
    with pytest.raises(ConfigError, match="no room"):
        answerer.generate(["a"], stops=[[]], max_tokens=[answerer.context])


def test_a_context_that_the_model_does_not_have_is_refused(scored_model):
    assert math.isfinite(EngineAnswerer(scored_model, context=8).rolling([HEADER])[0])
    for context in (1, 97):
        with pytest.raises(ConfigError, match="context"):
            EngineAnswerer(scored_model, context=context)


def test_a_text_that_the_cache_cannot_hold_is_refused(scored_folder):
    small = EngineAnswerer(load(scored_folder, device="cpu", cache_tokens=64))
    assert small.rolling([HEADER]) != [0.0]
    with pytest.raises(ConfigError, match="cache_tokens"):
        small.rolling([HEADER * 12])
    assert small.rolling([HEADER]) != [0.0]


def test_pages_are_given_back(answerer, scored_model):
    answerer.continuations(PAIRS)
    assert scored_model.streams.engine.stats().num_pages_in_use == 0


def test_chat_tasks_are_asked_as_a_users_message(scored_folder, scored_model):
    conversation = [{"role": "user", "content": "A word?"}]
    prompt = render_chat(scored_model.tokenizer, messages=conversation, add_generation_prompt=True)
    assert prompt.endswith("<｜Assistant｜>")
    with eval_run._of_folder(scored_folder, weights="auto", device="cpu", threads=1) as subject:
        chat, plain = (subject.answerer_for(TASKS[name]) for name in ("ifeval", "gsm8k"))
        said, same, bare = (
            answerer.generate([text], stops=[()], max_tokens=[8])
            for answerer, text in ((chat, "A word?"), (plain, prompt), (plain, "A word?"))
        )
    assert said == same != bare
