import pytest

from dsv3.errors import ConfigError
from dsv3.infer.conversation import Conversation
from dsv3.infer.loaded import LoadedModel
from dsv3.infer.runner import TorchRunner

GREEDY = {"temperature": 0.0, "max_tokens": 4}


@pytest.fixture
def new_conversation(model, tokenizer):
    def build(*, trained_length=64, **options):
        loaded = LoadedModel(
            TorchRunner(model), tokenizer=tokenizer, source="a test", is_base=False, trained_length=trained_length
        )
        return Conversation(loaded, **options)

    return build


def take_turn(conversation, question):
    text = "".join(conversation.ask(question, **GREEDY))
    conversation.remember(question, answer=text)
    return text


def test_turns_over_the_kept_cache_answer_as_one_conversation_read_anew(new_conversation, model, tokenizer):
    conversation = new_conversation(as_text=False, system="Be.")
    loaded = LoadedModel(TorchRunner(model), tokenizer=tokenizer, source="a test", is_base=False, trained_length=64)
    messages = [{"role": "system", "content": "Be."}]
    for question in ("a word", "the word"):
        messages.append({"role": "user", "content": question})
        expected = loaded.chat(messages, **GREEDY)
        assert take_turn(conversation, question) == expected
        messages.append({"role": "assistant", "content": expected})


def test_a_base_model_reads_one_running_text(new_conversation, model, tokenizer):
    conversation = new_conversation(as_text=True, system="Words.")
    loaded = LoadedModel(TorchRunner(model), tokenizer=tokenizer, source="a test", is_base=True, trained_length=64)
    first = take_turn(conversation, "In the")
    assert first == loaded.generate("Words.\nIn the", **GREEDY)
    assert take_turn(conversation, "and") == loaded.generate(f"Words.\nIn the\n{first}\nand", **GREEDY)


def test_a_running_text_drops_its_oldest_turns_but_not_the_system_text(new_conversation, tokenizer):
    conversation = new_conversation(as_text=True, system="Words.", trained_length=40)
    conversation.remember("the first question of all", answer="x" * 30)
    conversation.remember("second", answer="y")
    stream = conversation.ask("third", **GREEDY)
    assert stream.prompt_tokens == 1 + len(tokenizer.encode("Words.\nsecond\ny\nthird"))


def test_a_chat_that_outgrows_the_context_is_refused(new_conversation):
    conversation = new_conversation(as_text=False)
    conversation.remember("q", answer="x" * 80)
    with pytest.raises(ConfigError, match="the model's context is 64 tokens"):
        conversation.ask("more", **GREEDY)


def test_a_reset_forgets_the_turns(new_conversation):
    conversation = new_conversation(as_text=False, system="Be.")
    first = take_turn(conversation, "a word")
    take_turn(conversation, "another")
    conversation.reset()
    assert take_turn(conversation, "a word") == first


def test_a_question_that_was_not_remembered_leaves_no_trace(new_conversation):
    asked, fresh = (new_conversation(as_text=False) for _ in range(2))
    next(asked.ask("something else", **GREEDY))
    assert take_turn(asked, "a word") == take_turn(fresh, "a word")
