//! What becomes of each tensor, by its name.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context, Result, bail, ensure};
use tch::Kind;
use vora_lora::{EMBEDDING_HALVES, LINEAR_HALVES, PEFT_PREFIX, adapted_module};

use super::head;
use super::layout::Layout;
use super::published;
use super::report::Change;
use super::source::{LLAVA, LLM_PREFIX, Part, Source, is_original};
use super::step::Step;

/// What a rule says of a name.
enum Fate {
    To(String),
    Dropped(&'static str),
    Unknown,
}

/// What stands before the names of a LLaVA that are not its LLM's.
const LLAVA_SIGHT: [&str; 2] = ["vision_tower.", "multi_modal_projector."];

/// What stands before the names of a VoRA that are not its LLM's.
const SIGHT: [&str; 2] = ["vision_embedding.", "aux_vision."];

/// `has_bias` says of the LLM's own names which are biases that only a layer with adapters has.
fn fate(from: Layout, to: Layout, name: &str, has_bias: impl Fn(&str) -> bool) -> Fate {
    let sees = SIGHT.iter().any(|prefix| name.starts_with(prefix));
    let in_llm = name.strip_prefix(LLM_PREFIX);
    let prefixed = |pairs: [(&str, &str); 4]| {
        let renamed = pairs.iter().find_map(|(old, new)| Some(format!("{new}{}", name.strip_prefix(old)?)));
        renamed.map_or(Fate::Unknown, Fate::To)
    };
    match (from, to) {
        (Layout::Llava | Layout::PeftLlava, Layout::LlavaTransformers5) => prefixed(LLAVA),
        (Layout::LlavaTransformers5, Layout::Llava) => prefixed(LLAVA.map(|(published, module)| (module, published))),
        (Layout::Llava | Layout::LlavaTransformers5, Layout::Llm) => match llm_of_llava(from, name) {
            Some(name) => Fate::To(name),
            None if LLAVA_SIGHT.iter().any(|part| name.trim_start_matches("model.").starts_with(part)) => {
                Fate::Dropped("it sees")
            }
            None => Fate::Unknown,
        },
        (Layout::Llava | Layout::LlavaTransformers5, Layout::Mmproj) => match llm_of_llava(from, name) {
            Some(_) => Fate::Dropped("it speaks"),
            None => Fate::To(name.strip_prefix("model.").unwrap_or(name).to_owned()),
        },
        (Layout::Vora, Layout::Mmproj) => match in_llm {
            Some(_) => Fate::Dropped("it speaks"),
            None if name.starts_with(SIGHT[0]) => Fate::To(name.to_owned()),
            None if sees => Fate::Dropped("a head for the teacher"),
            None => Fate::Unknown,
        },
        (Layout::Vora, Layout::Llm) | (Layout::VoraUnmerged, Layout::FrozenLlm) => match in_llm {
            Some(name) if adapted_module(name).is_some() => Fate::Dropped("an adapter"),
            Some(name) if has_bias(name) => Fate::Dropped("the bias of a layer with adapters"),
            Some(name) => Fate::To(name.to_owned()),
            None if sees => Fate::Dropped("it sees"),
            None => Fate::Unknown,
        },
        (Layout::VoraUnmerged, Layout::Peft) => match in_llm {
            Some(in_base) if adapted_module(in_base).is_some() => Fate::To(format!("{PEFT_PREFIX}{in_base}")),
            // No model of PEFT's has a place for it: it goes with the vision weights.
            Some(in_base) if has_bias(in_base) => Fate::To(name.to_owned()),
            Some(_) => Fate::Dropped("frozen: it stays with the LLM"),
            None if sees => Fate::To(name.to_owned()),
            None => Fate::Unknown,
        },
        (Layout::VoraUnmerged | Layout::Peft, _) if in_llm.is_none() && !sees => Fate::Unknown,
        _ => Fate::To(name.to_owned()),
    }
}

/// The name that a LLaVA's tensor has in its LLM's own folder.
fn llm_of_llava(layout: Layout, name: &str) -> Option<String> {
    match layout {
        Layout::Llava => name.strip_prefix("language_model.").map(str::to_owned),
        _ if name.starts_with("lm_head.") => Some(name.to_owned()),
        _ => Some(format!("model.{}", name.strip_prefix("model.language_model.")?)),
    }
}

/// What becomes of every tensor of the source.
pub(super) fn steps(source: &Source, to: Layout, kind: Option<Kind>) -> Result<Vec<Step>> {
    let mut parts = source.parts();
    let mut steps = Vec::new();
    let info = |part: &Part| {
        let found = source.checkpoints[part.checkpoint].info(&part.stored).context("a tensor of this checkpoint")?;
        anyhow::Ok((found.0, found.1.to_vec()))
    };
    if source.is_foreign_adapter() {
        for part in parts.extract_if(.., |part| is_original(part)).collect::<Vec<_>>() {
            let (stored, shape) = info(&part)?;
            steps.push(Step::dropped(part, "the base as it was", stored, shape));
        }
    }
    // What an adapter's folder has whole stands for what the base has.
    let mut seen = HashSet::new();
    let replaced = parts.extract_if(.., |part| !seen.insert(part.name.clone())).collect::<Vec<_>>();
    let replaced_names: HashSet<String> = replaced.iter().map(|part| part.name.clone()).collect();
    let mut replaced_kinds = BTreeMap::new();
    for part in replaced {
        let (stored, shape) = info(&part)?;
        replaced_kinds.insert(part.name.clone(), stored);
        steps.push(Step::dropped(part, "the adapter's folder has its own", stored, shape));
    }
    check_whole(source, &parts, &replaced_names)?;
    for (part, why) in head::settle(source, &mut parts)? {
        let (stored, shape) = info(&part)?;
        // Head and embedding were one tensor of the base.
        let tied = parts.iter().map(|part| &part.name).filter(|name| name.ends_with("lm_head.weight"));
        replaced_kinds.extend(tied.chain([&part.name]).map(|name| (name.clone(), stored)));
        steps.push(Step::dropped(part, why, stored, shape));
    }
    check_adapters(source, &parts, to)?;
    ensure!(
        to != Layout::Llm || source.lora.is_some() || parts.iter().all(|part| adapted_module(&part.name).is_none()),
        "{} has adapters beside its weights; `vora merge` folds them in",
        source.path.display()
    );

    let mut folded: BTreeMap<String, Vec<Part>> = BTreeMap::new(); // parts of adapters, by the name of their weight
    if source.layout.merges_into(to) {
        for part in parts.extract_if(.., |part| adapted_module(&part.name).is_some()) {
            let module = adapted_module(&part.name).context("a part of an adapter")?;
            folded.entry(format!("{module}.weight")).or_default().push(part);
        }
    }
    let has_bias = |name: &str| source.vora.as_ref().is_some_and(|vora| vora.has_layer_bias(name));
    if (source.layout, to) == (Layout::Vora, Layout::Llm) {
        refuse_biases(&parts, has_bias)?;
    }
    let mut unknown = Vec::new();
    for part in parts {
        let (stored, shape) = info(&part)?;
        let is_real = matches!(stored, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16);
        let name = match fate(source.layout, to, &part.name, has_bias) {
            Fate::To(name) => name,
            Fate::Dropped(why) => {
                steps.push(Step::dropped(part, why, stored, shape));
                continue;
            }
            Fate::Unknown => {
                unknown.push(part.stored);
                continue;
            }
        };
        let adapter = folded.remove(&part.name).unwrap_or_default();
        let change = match () {
            () if !adapter.is_empty() => Change::Made,
            () if part.stored == name => Change::Kept,
            () => Change::Renamed,
        };
        // A sum is not rounded to a copy's dtype where the base has a wider one.
        let base = replaced_kinds.get(&part.name).filter(|_| !adapter.is_empty());
        let widest =
            base.filter(|base| base.elt_size_in_bytes() > stored.elt_size_in_bytes()).copied().unwrap_or(stored);
        let kind = kind.filter(|_| is_real).unwrap_or(widest);
        let from = std::iter::once(part).chain(adapter).collect();
        steps.push(Step { from, to: Some(name), change, why: None, stored_kind: stored, kind, shape, scaling: 1.0 });
    }
    if to == Layout::VoraUnmerged {
        published::complete(&mut steps, source)?;
    }
    ensure!(unknown.is_empty(), "no part of {} is named\n  {}", source.layout, unknown.join("\n  "));
    steps.sort_by(|a, b| order(a).cmp(&order(b)));
    let mut names = HashSet::new();
    if let Some(twice) = steps.iter().filter_map(|step| step.to.as_ref()).find(|name| !names.insert(name.as_str())) {
        bail!("two tensors would be named `{twice}`");
    }
    Ok(steps)
}

/// An error where an LLM would lose biases that no layer of its own has.
fn refuse_biases(parts: &[Part], has_bias: impl Fn(&str) -> bool) -> Result<()> {
    let lost = parts.iter().filter(|part| part.name.strip_prefix(LLM_PREFIX).is_some_and(&has_bias));
    let lost: Vec<&str> = lost.map(|part| part.stored.as_str()).collect();
    ensure!(
        lost.is_empty(),
        "the LLM has {} biases from layers with adapters, as {}, for which its own layout has no place; it runs as `vora`",
        lost.len(),
        lost[0]
    );
    Ok(())
}

/// What is written before what is dropped, and layer 2 before layer 10.
fn order(step: &Step) -> (bool, Vec<(Option<u64>, &str)>) {
    let name = step.to.as_ref().unwrap_or_else(|| &step.from[0].stored);
    (step.to.is_none(), name.split('.').map(|part| (part.parse().ok(), part)).collect())
}

/// An error where an adapter's folder has a tensor that is neither a part of an adapter nor one of its base's: all of
/// them are named. A head stands also where the base's is its embedding.
fn check_whole(source: &Source, parts: &[Part], of_base: &HashSet<String>) -> Result<()> {
    if source.layout != Layout::Peft && !source.is_foreign_adapter() {
        return Ok(());
    }
    let fits = |part: &Part| {
        let head = part.name.strip_prefix(source.llm_prefix()) == Some("lm_head.weight");
        part.checkpoint != 0 || adapted_module(&part.name).is_some() || of_base.contains(&part.name) || head
    };
    let stray: Vec<&str> = parts.iter().filter(|part| !fits(part)).map(|part| part.stored.as_str()).collect();
    ensure!(
        stray.is_empty(),
        "the adapter has tensors that fit nothing in its base; was it made for another model?\n  {}",
        stray.join("\n  ")
    );
    Ok(())
}

/// An error where an adapter is half, of another shape than its weight, of another rank than it should be, or where
/// its weight is missing; all of them are told.
fn check_adapters(source: &Source, parts: &[Part], to: Layout) -> Result<()> {
    let Some(lora) = &source.lora else { return Ok(()) };
    if to == Layout::FrozenLlm {
        return Ok(());
    }
    let shapes: BTreeMap<&str, &[i64]> = parts
        .iter()
        .filter_map(|part| Some((part.name.as_str(), source.checkpoints[part.checkpoint].info(&part.stored)?.1)))
        .collect();
    let modules: BTreeSet<&str> = parts.iter().filter_map(|part| adapted_module(&part.name)).collect();
    let mut wrong = Vec::new();
    for module in modules {
        let shape = |name: &str| shapes.get(format!("{module}.{name}").as_str()).copied();
        let is_embedding = EMBEDDING_HALVES.into_iter().any(|half| shape(half).is_some());
        let halves = if is_embedding { EMBEDDING_HALVES } else { LINEAR_HALVES };
        match (shape("weight"), shape(halves[0]), shape(halves[1])) {
            (Some(weight), Some(a), Some(b)) => {
                let r = lora.rank(module)?.r;
                let turned: Vec<i64> = weight.iter().rev().copied().collect();
                let linear = if is_embedding { &turned } else { weight };
                if !matches!((linear, a, b), ([out, width], [ar, aw], [bo, br]) if [ar, br] == [&r; 2] && aw == width && bo == out)
                {
                    wrong.push(format!("{module}: weight {weight:?}, A {a:?} and B {b:?} of rank {r} do not fit"));
                }
            }
            (weight, a, b) => {
                let names = [(weight, "weight"), (a, halves[0]), (b, halves[1])];
                let missing: Vec<&str> = names.iter().filter(|(found, _)| found.is_none()).map(|(_, n)| *n).collect();
                wrong.push(format!("{module} lacks {}", missing.join(", ")));
            }
        }
    }
    ensure!(wrong.is_empty(), "adapters that fit no weight:\n  {}", wrong.join("\n  "));
    Ok(())
}
