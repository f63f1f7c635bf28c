import io
import logging

import pytest
import torch

from dsv3.checkpoint.published import save_published
from dsv3.checkpoint.snapshot import save_snapshot
from dsv3.cli.main import main
from dsv3.config import BatchConfig, ModelConfig, PretrainConfig, SnapshotConfig
from dsv3.config.files import write_config
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.conversation import Conversation
from dsv3.infer.loaded import load
from dsv3.model.transformer import Transformer

OPTIONS = ("--device", "cpu", "--weights", "fp32", "--max-tokens", "6", "--temperature", "0")
GREEDY = {"max_tokens": 6, "temperature": 0.0}
ROW_LENGTH = 48


@pytest.fixture(scope="module")
def weights():
    """A small random model and its tokenizer."""
    tokenizer = Tokenizer.train(["In the beginning there was a word. 你好"] * 3, vocab_size=300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        initializer_range=0.2,
        max_position_embeddings=64,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=16,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
    )
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model, tokenizer


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, weights):
    """A published-format folder, whose tokenizer has a chat format."""
    folder = tmp_path_factory.mktemp("chat")
    model, tokenizer = weights
    tokenizer.save(folder / "tokenizer")
    save_published(model, folder=folder / "weights", tokenizer_folder=folder / "tokenizer", dtype=torch.float32)
    return folder / "weights"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, weights):
    """A pre-training run with one snapshot."""
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = weights
    batch = BatchConfig(sequence_length=ROW_LENGTH).steady(1)
    write_config(PretrainConfig(model=model.config, batch=batch), path=folder / "config.json")
    tokenizer.save(folder / "corpus" / "tokenizer")
    tensors = {"model": model.state_dict()}
    save_snapshot(folder / "snapshots", step=1, tensors=tensors, state={}, policy=SnapshotConfig())
    return folder


@pytest.fixture(autouse=True)
def quiet_afterwards():
    """Leave the log as it was: the command line turns it on for the whole process."""
    logger = logging.getLogger("dsv3")
    before = (logger.handlers[:], logger.propagate, logger.level)
    threads = torch.get_num_threads()
    yield
    logger.handlers[:], logger.propagate, logger.level = before
    torch.set_num_threads(threads)


@pytest.fixture
def chat(monkeypatch, capsys):
    """Give lines on standard input, and return status, output and errors."""

    def run(folder, text, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        with pytest.raises(SystemExit) as end:
            main(["chat", str(folder), *OPTIONS, *map(str, arguments)])
        return end.value.code, *capsys.readouterr()

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_each_line_is_a_turn_of_one_conversation(chat, chat_folder):
    status, output, _ = chat(chat_folder, "a word\n\nthe word\n")
    loaded, messages, expected = load(chat_folder, device="cpu"), [], ""
    for question in ("a word", "the word"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": loaded.chat(messages, **GREEDY)})
        expected += messages[-1]["content"] + "\n"
    assert (status, output) == (0, expected)


def test_the_system_text_stands_before_the_conversation(chat, chat_folder):
    _, output, _ = chat(chat_folder, "a word\n", "--system", "Be.")
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "a word"}]
    assert output == load(chat_folder, device="cpu").chat(messages, **GREEDY) + "\n"


def test_a_base_model_says_so_at_the_start_and_continues_the_text(chat, base_folder):
    status, output, errors = chat(base_folder, "In the\n")
    assert (status, output) == (0, load(base_folder, device="cpu").generate("In the", **GREEDY) + "\n")
    assert "This is a base model" in errors
    assert f"trained on texts of {ROW_LENGTH} tokens" in errors


def test_a_model_with_a_chat_format_is_not_called_a_base_model(chat, chat_folder):
    assert "base model" not in chat(chat_folder, "")[2]


def test_the_format_can_be_chosen_against_the_model(chat, chat_folder, base_folder):
    message = [{"role": "user", "content": "a word"}]
    _, as_text, _ = chat(chat_folder, "a word\n", "--format", "text")
    assert as_text == load(chat_folder, device="cpu").generate("a word", **GREEDY) + "\n"
    _, as_chat, errors = chat(base_folder, "a word\n", "--format", "chat")
    assert as_chat == load(base_folder, device="cpu").chat(message, **GREEDY) + "\n"
    assert "has not seen it in training" in errors


def test_reset_begins_anew_and_exit_leaves(chat, chat_folder):
    _, output, errors = chat(chat_folder, "a word\nmore\n/reset\na word\n/exit\nnever read\n")
    loaded, messages = load(chat_folder, device="cpu"), [{"role": "user", "content": "a word"}]
    first = loaded.chat(messages, **GREEDY)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    assert output == f"{first}\n{loaded.chat(messages, **GREEDY)}\n{first}\n"
    assert "The conversation is forgotten." in errors


def test_an_unknown_command_is_refused_with_those_there_are(chat, chat_folder):
    status, output, errors = chat(chat_folder, "/quit now\n")
    assert (status, output) == (0, "")
    assert "There is no command /quit: /reset forgets" in errors


def test_a_question_that_begins_with_a_slash_needs_a_space(chat, chat_folder):
    _, output, errors = chat(chat_folder, " /etc\n")
    assert output == load(chat_folder, device="cpu").chat([{"role": "user", "content": " /etc"}], **GREEDY) + "\n"
    assert "no command" not in errors


def test_a_conversation_that_is_full_is_told_and_can_be_reset(chat, chat_folder):
    status, output, errors = chat(chat_folder, f"{'x' * 70}\n/reset\na word\n")
    assert status == 0
    assert "the model's context is 64 tokens" in errors
    assert "/reset starts a new conversation" in errors
    assert output == load(chat_folder, device="cpu").chat([{"role": "user", "content": "a word"}], **GREEDY) + "\n"


def test_speed_is_printed_after_each_answer_when_asked_for(chat, chat_folder):
    _, _, errors = chat(chat_folder, "a word\nthe word\n", "--speed", "--seed", 7)
    assert errors.count("tokens/s") == 2
    assert "seed 7]" in errors
    assert "seed 8]" in errors


def test_a_wrong_setting_is_refused_before_the_model_is_loaded(chat, tmp_path):
    status, output, errors = chat(tmp_path / "absent", "", "--top-p", "2")
    assert (status, output) == (2, "")
    assert "top_p = 2.0" in errors


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chat, chat_folder, monkeypatch):
    remembered = []

    def interrupted(conversation, question, **settings):
        yield "half an "
        raise KeyboardInterrupt

    def remember(conversation, question, *, answer):
        remembered.append((question, answer))

    monkeypatch.setattr(Conversation, "ask", interrupted)
    monkeypatch.setattr(Conversation, "remember", remember)
    status, output, errors = chat(chat_folder, "one\ntwo\n")
    assert (status, output) == (0, "half an \nhalf an \n")
    assert errors.count("[stopped]") == 2
    assert remembered == [("one", "half an "), ("two", "half an ")]


def test_a_conversation_goes_on_after_an_answer_was_stopped(chat_folder):
    loaded = load(chat_folder, device="cpu")
    conversation = Conversation(loaded, as_text=False)
    stream = conversation.ask("a word", **GREEDY)
    said = next(stream)  # and no more: the reader pressed Ctrl-C
    conversation.remember("a word", answer=said)
    messages = [
        {"role": "user", "content": "a word"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "go on"},
    ]
    assert "".join(conversation.ask("go on", **GREEDY)) == loaded.chat(messages, **GREEDY)


def test_on_a_terminal_ctrl_c_at_the_prompt_stays_and_ctrl_d_leaves(chat, chat_folder, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "a word", EOFError])
    prompts = []

    def typed_line(prompt):
        prompts.append(prompt)
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed_line)
    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(SystemExit) as end:
        main(["chat", str(chat_folder), *OPTIONS])
    output, errors = capsys.readouterr()
    assert end.value.code == 0
    assert prompts == ["> "] * 3
    assert "Ctrl-D or /exit leaves." in errors
    answer = load(chat_folder, device="cpu").chat([{"role": "user", "content": "a word"}], **GREEDY)
    assert answer in output
