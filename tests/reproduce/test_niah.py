from types import SimpleNamespace

from dsv3.reproduce import niah


def test_a_model_of_short_rows_may_be_asked_as_far_as_it_is_extended():
    base = niah.config_for("base", quick=False)
    assert base.batch.sequence_length == 128
    assert base.model.max_position_embeddings == 8192
    phases = niah.phases_after(base, quick=False)
    assert [phase.batch.sequence_length for phase in phases] == [1024, 8192]
    for phase in phases:
        assert phase.batch.final_sequences % (niah.RANKS * phase.batch.micro_batch_sequences) == 0, "ranks share a step"
        assert phase.total_tokens % (phase.batch.final_sequences * phase.batch.sequence_length) == 0
    assert {phase.model.rope_scaling.original_max_position_embeddings for phase in phases} == {128}


def test_the_haystack_has_no_text_that_is_made_up(monkeypatch, tmp_path):
    """In documents of recall other needles lie about."""
    documents = {name: [[0, at, at], [0, at]] for at, name in enumerate(niah.GENERATED + niah.REAL, start=1)}
    monkeypatch.setattr(niah, "load_prepared", lambda folder: folder)
    monkeypatch.setattr(niah, "held_out_text", lambda corpus, max_tokens: SimpleNamespace(documents=documents))
    assert niah.haystack(niah.real_text(tmp_path, tokens=1)) == [4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert set(niah.REAL).isdisjoint(niah.GENERATED)
    assert {source.name for source in niah.config_for("base", quick=False).data.sources} == {
        *niah.REAL,
        *niah.GENERATED,
    }
