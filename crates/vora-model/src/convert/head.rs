//! Whether the head of a model with an adapter of others merged into it is its own, or its embedding still.

use anyhow::{Context, Result};
use serde_json::Value;
use vora_files::tell_once;
use vora_llm::LlmConfig;
use vora_lora::{EMBEDDING_HALVES, LINEAR_HALVES};

use super::layout::Layout;
use super::source::{Part, Source, read_object};
use crate::llava::LlavaConfig;

/// Makes `parts` those of the model that PEFT's `merge_and_unload().save_pretrained()` writes, where the base ties its
/// head to its embedding and the adapter has one of them or both; gives the parts that are dropped for it, and why.
///
/// Where an adapter is on either of the two, both are written, as they were trained: PEFT's layers add it to the head or
/// to the embedding alone, but its merge adds it in place to the one tensor that both are, which is another model, as it
/// warns (`BaseTuner`: merging "can lead to complications").
pub(super) fn settle(source: &Source, parts: &mut Vec<Part>) -> Result<Vec<(Part, &'static str)>> {
    if !source.is_foreign_adapter() || !ties(source)? {
        return Ok(Vec::new());
    }
    let [head, embedding] =
        ["lm_head", "model.embed_tokens"].map(|name| format!("{}{name}.weight", source.llm_prefix()));
    let adapted = [(&head, LINEAR_HALVES[0]), (&embedding, EMBEDDING_HALVES[0])]
        .map(|(weight, half)| format!("{}{half}", weight.trim_end_matches("weight")));
    let find = |name: &str| parts.iter().find(|part| part.name == name).cloned();
    let tensor = |part: &Part| source.checkpoints[part.checkpoint].tensor(&part.stored);
    let in_base = |name: &str| source.parts().into_iter().find(|part| part.checkpoint > 0 && part.name == name);
    let Some(base) = in_base(&embedding) else { return Ok(Vec::new()) };
    if let Some(other) = in_base(&head)
        && !tensor(&other)?.equal(&tensor(&base)?)
    {
        return Ok(Vec::new()); // not tied, whatever the config says
    }
    let is_own = |part: &Option<Part>| part.as_ref().is_some_and(|part| part.checkpoint == 0);
    let (found_head, found_embedding) = (find(&head), find(&embedding));
    let own_embedding = is_own(&found_embedding);
    let is_adapted = adapted.iter().any(|name| find(name).is_some());
    if is_adapted {
        let copy = [&found_head, &found_embedding].into_iter().find(|part| is_own(part)).cloned().flatten();
        return Ok(both(parts, copy, base, [head, embedding]));
    }
    let is_tied = if let (Some(head), Some(embedding), true) = (&found_head, &found_embedding, is_own(&found_head)) {
        tensor(head)?.equal(&tensor(embedding)?)
    } else if own_embedding {
        stays_tied(source, found_embedding.as_ref().context("an embedding")?, &base)?
    } else {
        return Ok(Vec::new()); // neither is the adapter's
    };
    if is_tied {
        let dropped = parts.extract_if(.., |part| part.name == head);
        return Ok(dropped.map(|part| (part, "it is tied to the embedding")).collect());
    }
    if found_head.is_none() {
        // The head is what the embedding was.
        parts.push(Part { name: head, ..base });
    }
    Ok(Vec::new())
}

/// Gives `parts` a head and an embedding, both of them the adapter's `copy` of either, into which PEFT loads it, for they
/// are one there; without a copy, what the `base` has of both. Gives what that leaves of the base.
fn both(parts: &mut Vec<Part>, copy: Option<Part>, base: Part, names: [String; 2]) -> Vec<(Part, &'static str)> {
    let is_replaced = |part: &mut Part| copy.is_some() && part.checkpoint > 0 && names.contains(&part.name);
    let dropped: Vec<Part> = parts.extract_if(.., is_replaced).collect();
    let tensor = copy.unwrap_or(base);
    for name in names.iter().filter(|name| parts.iter().all(|part| part.name != **name)).collect::<Vec<_>>() {
        parts.push(Part { name: name.clone(), ..tensor.clone() });
    }
    dropped.into_iter().map(|part| (part, "the adapter's folder has its own")).collect()
}

/// Whether the base's head is its embedding by what its config says.
fn ties(source: &Source) -> Result<bool> {
    let config = source.config.clone().context("an adapter's base has a config.json")?;
    Ok(if source.layout == Layout::PeftLlava {
        LlavaConfig::from_json(config)?.llm.tie_word_embeddings
    } else {
        serde_json::from_value::<LlmConfig>(Value::Object(config))?.tie_word_embeddings
    })
}

/// Whether the head follows an embedding that the adapter has alone. With PEFT's `ensure_weight_tying` it does, else the
/// head stays what it was; of a vocabulary of another size there is no such head.
fn stays_tied(source: &Source, own: &Part, base: &Part) -> Result<bool> {
    let config = read_object(&source.path.join("adapter_config.json"))?.unwrap_or_default();
    if config.get("ensure_weight_tying").and_then(Value::as_bool) == Some(true) {
        return Ok(true);
    }
    let shape = |part: &Part| source.checkpoints[part.checkpoint].info(&part.stored).map(|(_, shape)| shape.to_vec());
    let (own, base) = (shape(own), shape(base));
    if own != base {
        tell_once(format!(
            "{}: the embedding is {own:?}, that of the base {base:?}, and there is no lm_head for it: the head stays tied to \
             the new embedding",
            source.path.display()
        ));
    }
    Ok(own != base)
}
