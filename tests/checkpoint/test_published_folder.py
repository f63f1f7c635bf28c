import torch
from safetensors.torch import save_file

from dsv3.checkpoint.published_folder import is_published_folder


def test_a_folder_is_published_when_it_has_weights_and_a_model_type(folder, tmp_path, edit_config):
    assert is_published_folder(folder)
    assert not is_published_folder(tmp_path / "absent")
    edit_config(folder, model_type=None)
    assert not is_published_folder(folder)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert not is_published_folder(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert is_published_folder(tmp_path)
