//! The published code's own form of a VoRA whose adapters are apart: every layer with adapters has all of them, of one
//! rank and unscaled, and each linear of it a bias. What is written in it opens there and says the same.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tch::Kind;
use vora_lora::LoraConfig;

use super::source::{LLM_PREFIX, Source};
use super::step::Step;

/// The parts of an adapter, and of what goes with it, by their names after that of its linear.
const PARTS: [&str; 4] = ["weight", "lora_A.weight", "lora_B.weight", "bias"];

/// Layer and linear of a tensor that is one of [`PARTS`]: `llm.model.layers.1.mlp.up_proj.bias` -> 1, `mlp.up_proj`.
fn place(name: &str) -> Option<(i64, &str, &'static str)> {
    let (layer, rest) = name.strip_prefix(LLM_PREFIX)?.strip_prefix("model.layers.")?.split_once('.')?;
    let part = PARTS.into_iter().rev().find(|part| rest.strip_suffix(part).is_some_and(|head| head.ends_with('.')))?;
    let module = rest.strip_suffix(part)?.strip_suffix('.')?;
    module.ends_with("_proj").then_some((layer.parse().ok()?, module, part))
}

/// Dtype and shape of a linear layer's tensors, by their names in it.
type Parts = BTreeMap<&'static str, (Kind, Vec<i64>)>;

/// Brings adapters into that form: `B` is scaled, smaller ranks are filled up with zeros, and what is missing is zero.
/// A DoRA stays as it is, the published code has no place for its lengths.
pub(super) fn complete(steps: &mut Vec<Step>, source: &Source) -> Result<()> {
    let lora = source.lora.as_ref().context("adapters have a configuration")?;
    let written = |step: &Step| step.info().map(|info| info.name);
    if steps.iter().filter_map(written).any(|name| name.ends_with(".lora_magnitude_vector")) {
        return Ok(());
    }
    let mut shapes: BTreeMap<(i64, String), Parts> = BTreeMap::new();
    for info in steps.iter().filter_map(Step::info) {
        if let Some((layer, module, part)) = place(&info.name) {
            shapes.entry((layer, module.to_owned())).or_default().insert(part, (info.kind, info.shape));
        }
    }
    let adapted = shapes.iter().filter(|(_, parts)| parts.contains_key("lora_A.weight"));
    let modules: BTreeSet<String> = adapted.clone().map(|((_, module), _)| module.clone()).collect();
    let ranks = adapted.filter_map(|(_, parts)| parts["lora_A.weight"].1.first().copied());
    let r = ranks.max().context("there are no adapters")?;
    for step in steps.iter_mut() {
        let Some(name) = step.to.clone() else { continue };
        match place(&name) {
            Some((_, module, "lora_B.weight")) => {
                let path = name.strip_suffix(".lora_B.weight").unwrap_or(module);
                step.fit(lora.rank(path)?.scaling, 1, r);
            }
            Some((_, _, "lora_A.weight")) => step.fit(1.0, 0, r),
            _ => {}
        }
    }
    for ((layer, module), parts) in &shapes {
        if *layer >= lora.layers || !modules.contains(module) {
            continue;
        }
        let Some((kind, shape)) = parts.get("weight") else { continue };
        let [out, width] = shape[..] else { continue };
        let a_kind = parts.get("lora_A.weight").map_or(*kind, |(kind, _)| *kind);
        for (part, kind, shape) in [
            ("lora_A.weight", a_kind, vec![r, width]),
            ("lora_B.weight", a_kind, vec![out, r]),
            ("bias", *kind, vec![out]),
        ] {
            if !parts.contains_key(part) {
                let name = format!("{LLM_PREFIX}model.layers.{layer}.{module}.{part}");
                steps.push(Step::zeros(name, kind, shape));
            }
        }
    }
    Ok(())
}

/// What the config of that form says of its adapters, where it says something else now.
pub(super) fn set_config(config: &mut Map<String, Value>, source: &Source, steps: &[Step]) -> Result<()> {
    let before = source.lora.as_ref().context("adapters have a configuration")?;
    let names: Vec<_> = steps.iter().filter_map(Step::info).collect();
    let modules: BTreeSet<String> = names
        .iter()
        .filter_map(|info| place(&info.name).filter(|(_, _, part)| *part == "lora_A.weight"))
        .map(|(_, module, _)| module.to_owned())
        .collect();
    let r = names.iter().find(|info| info.name.ends_with(".lora_A.weight")).map(|info| info.shape[0]);
    let is_dora = names.iter().any(|info| info.name.ends_with(".lora_magnitude_vector"));
    let Some(r) = r.filter(|_| !is_dora) else { return Ok(()) };
    let listed: BTreeSet<String> = before.target_modules.iter().cloned().collect();
    let target_modules = if listed == modules { before.target_modules.clone() } else { modules.into_iter().collect() };
    let lora = LoraConfig { target_modules, ..LoraConfig::new(r, before.layers) };
    if lora != *before {
        config.insert("lora".into(), json!(lora));
    }
    if config.contains_key("llm_model_type") {
        config.insert("lora_layer_bias".into(), true.into());
    }
    Ok(())
}
