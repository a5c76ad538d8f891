//! `vora inspect`: what lies in a checkpoint, without loading it.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use serde_json::{Map, Value};
use tch::Kind;
use vora_model::named;
use vora_model::trained::{LLM, VISION, is_whole};
use vora_torch::checkpoint::Checkpoint;

/// Show a checkpoint's tensors, adapters and parameter counts; of what a run trained also those of the models that it stands on.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora inspect runs/scenes/merged
  vora inspect runs/scenes/final
  vora inspect runs/scenes/final/adapter_model.safetensors --tensors")]
pub(crate) struct Args {
    /// A folder with safetensors in it, a run's final/ or checkpoint, a .safetensors file, or a model's name in the hub's cache
    model: String,
    /// List every tensor, not only the groups
    #[arg(long)]
    tensors: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What stands under one prefix.
#[derive(Debug, Default, serde::Serialize)]
struct Group {
    tensors: usize,
    parameters: i64,
    trained: i64, // of the parameters, those of a run
    bytes: i64,
}

/// Tensors of one file or folder.
struct Source {
    checkpoint: Checkpoint,
    /// What stands before their names in the whole model.
    prefix: &'static str,
    is_trained: bool,
}

/// What lies at `path`: one checkpoint, or what a run trained with the models below it, which are those that its config names. Of
/// what is trained in place of theirs theirs comes last.
fn sources(path: &Path) -> Result<Vec<Source>> {
    let one = |path: &Path, prefix, is_trained| {
        anyhow::Ok(Source { checkpoint: Checkpoint::open(path)?, prefix, is_trained })
    };
    let parts = ["adapter_model.safetensors", LLM, VISION].map(|file| path.join(file));
    let is_run = path.join("config.json").is_file() && parts.iter().any(|file| file.is_file()) && !is_whole(path);
    if !is_run {
        return Ok(vec![one(path, "", false)?]);
    }
    let mut found = Vec::new();
    for file in parts.iter().filter(|file| file.is_file()) {
        found.push(one(file, "", true)?);
    }
    let config: Map<String, Value> = serde_json::from_slice(&std::fs::read(path.join("config.json"))?)?;
    for (key, prefix) in [("llm", ""), ("mm_vision_tower", "vision_tower.")] {
        let is_named = config.get(key).and_then(Value::as_str).is_some_and(|name| !name.is_empty());
        if !is_named || key == "llm" && parts[1].is_file() {
            continue;
        }
        match named::find(path, key, &vora_hub::resolve).and_then(|folder| one(&folder, prefix, false)) {
            Ok(below) => found.push(below),
            Err(error) => tracing::warn!("what was trained is counted without the model below it: {error:#}"),
        }
    }
    Ok(found)
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let path = PathBuf::from(&args.model);
    let path = if path.exists() { path } else { vora_hub::resolve(&args.model)? };
    let sources = sources(&path)?;
    let is_run = sources.iter().any(|source| source.is_trained);

    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    let mut adapters: BTreeMap<i64, usize> = BTreeMap::new();
    let mut rows = Vec::new();
    let mut seen = HashSet::new();
    for Source { checkpoint, prefix, is_trained } in &sources {
        for stored in checkpoint.names() {
            let Some((kind, shape)) = checkpoint.info(stored) else { continue };
            let name = format!("{prefix}{stored}");
            if !seen.insert(name.clone()) {
                continue; // trained in place of this one
            }
            let parameters = parameters(checkpoint, stored, shape)?;
            let bytes = shape.iter().product::<i64>() * kind.elt_size_in_bytes() as i64;
            for key in [group_of(&name), "total".to_owned()] {
                let group = groups.entry(key).or_default();
                group.tensors += 1;
                group.parameters += parameters;
                group.trained += if *is_trained { parameters } else { 0 };
                group.bytes += bytes;
            }
            if name.contains("lora_A") {
                *adapters.entry(shape[0]).or_default() += 1;
            }
            rows.push((name, vora_torch::runtime::name_of(kind), shape.to_vec(), parameters));
        }
    }

    let mut out = std::io::stdout().lock();
    if args.json {
        let tensors: Vec<_> = rows
            .iter()
            .map(|(name, kind, shape, n)| serde_json::json!({"name": name, "dtype": kind, "shape": shape, "parameters": n}))
            .collect();
        let adapters: Vec<_> = adapters.iter().map(|(r, n)| serde_json::json!({"r": r, "linear_layers": n})).collect();
        let json = serde_json::json!({"path": path, "groups": groups, "adapters": adapters, "tensors": tensors});
        writeln!(out, "{}", serde_json::to_string_pretty(&json)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "{}", path.display())?;
    let mut table = Table::new();
    if args.tensors {
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(["tensor", "dtype", "shape", "parameters"]);
        for (name, kind, shape, parameters) in rows {
            table.add_row([name, kind, format!("{shape:?}"), thousands(parameters)]);
        }
    } else {
        let header = ["part", "tensors", "parameters", "MiB"].into_iter().chain(is_run.then_some("trained"));
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header);
        let total = groups.remove("total").unwrap_or_default();
        for (name, group) in groups.into_iter().chain([("total".to_owned(), total)]) {
            let mebibytes = format!("{:.1}", group.bytes as f64 / f64::from(1 << 20));
            let row = [name, group.tensors.to_string(), thousands(group.parameters), mebibytes];
            table.add_row(row.into_iter().chain(is_run.then(|| thousands(group.trained))));
        }
    }
    writeln!(out, "{table}")?;
    for (r, layers) in adapters {
        writeln!(out, "adapter of rank {r} on {layers} linear layers")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The numbers of the model that a tensor holds: where a weight is packed in few bits its words stand for those of its
/// `weight_shape`, and what stands beside them for none.
fn parameters(checkpoint: &Checkpoint, name: &str, shape: &[i64]) -> Result<i64> {
    let packed =
        |part: &str| name.strip_suffix(part).filter(|weight| checkpoint.info(&format!("{weight}_packed")).is_some());
    if packed("_scale").or(packed("_shape")).or(packed("_zero_point")).or(packed("_g_idx")).is_some() {
        return Ok(0);
    }
    let sizes = packed("_packed").map(|weight| format!("{weight}_shape"));
    let sizes = match sizes.filter(|sizes| checkpoint.info(sizes).is_some()) {
        Some(sizes) => Vec::<i64>::try_from(checkpoint.tensor(&sizes)?.to_kind(Kind::Int64))?,
        None => shape.to_vec(),
    };
    sizes.iter().try_fold(1, |product: i64, size| product.checked_mul(*size)).context("a shape of too many numbers")
}

/// The part of the model that a tensor belongs to: its name up to the first number, adapters apart.
fn group_of(name: &str) -> String {
    let part: Vec<&str> = name.split('.').take_while(|s| s.parse::<usize>().is_err()).take(3).collect();
    let part = part.join(".");
    if name.contains(".lora_") { format!("{part} (adapters)") } else { part }
}

fn thousands(n: i64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_end_at_the_first_number() {
        assert_eq!(group_of("llm.model.layers.3.mlp.up_proj.weight"), "llm.model.layers");
        assert_eq!(group_of("llm.model.layers.3.mlp.up_proj.lora_A.weight"), "llm.model.layers (adapters)");
        assert_eq!(group_of("vision_embedding.pos_embed"), "vision_embedding.pos_embed");
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!([7, 1234, 134_515_008].map(thousands), ["7", "1,234", "134,515,008"]);
    }
}
