"""HellaSwag's documents as prompts and endings."""

import re
from typing import Any


def clean(text: str) -> str:
    """Take the marks of WikiHow out: a title ends a sentence, everything else in brackets goes."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def clean_document(document: dict[str, Any]) -> dict[str, Any]:
    """Return ``query`` and ``choices``; a document that has a query is clean but for brackets someone left in it."""
    if "ctx_a" in document:
        context = f"{document['ctx_a']} {document['ctx_b'].capitalize()}"
        texts = [f"{document['activity_label']}: {context}", *document["endings"]]
    else:
        texts = [document["query"], *document["endings"]]
    query, *choices = [clean(text) if "[" in text or "ctx_a" in document else text for text in texts]
    return {"query": query, "choices": choices}


def clean_documents(dataset: Any) -> Any:
    """Clean all documents of a split."""
    return dataset.map(clean_document)
