//! The same merge over a whole checkpoint, by tensor name.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use tch::{Kind, Tensor};

use crate::adapter::{MAGNITUDE, delta_weight};
use crate::config::LoraConfig;

/// A tensor that belongs to an adapter.
struct Part {
    module: String,
    adapter: String, // "" where names carry none
    part: usize,     // of `PARTS`
}

const PARTS: [&str; 5] = ["lora_A", "lora_B", MAGNITUDE, "lora_embedding_A", "lora_embedding_B"];

/// An adapter's tensors, each at its place in [`PARTS`].
type Parts = [Option<Tensor>; PARTS.len()];

impl Part {
    /// Reads `<module>.lora_A.weight`, or `<module>.lora_A.<adapter>.weight` as PEFT names them in memory; an embedding's
    /// halves, and DoRA's magnitude on disk, are without a `weight`.
    fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_suffix(".weight");
        let is_bare = || name.contains(".lora_embedding_") || name.ends_with(MAGNITUDE);
        let rest = rest.or_else(|| is_bare().then_some(name))?;
        let (part, at) = PARTS.iter().enumerate().find_map(|(i, part)| Some((i, rest.rfind(&format!(".{part}"))?)))?;
        let (module, adapter) = (&rest[..at], &rest[at + 1 + PARTS[part].len()..]);
        let adapter = if adapter.is_empty() { "" } else { adapter.strip_prefix('.')? };
        Some(Self { module: module.to_owned(), adapter: adapter.to_owned(), part })
    }
}

/// `A` and `B`, and whether they are an embedding's.
fn halves<'a>(module: &str, parts: &'a Parts) -> Result<(&'a Tensor, &'a Tensor, bool)> {
    let missing = match parts {
        [Some(a), Some(b), _, None, None] => return Ok((a, b, false)),
        [None, None, _, Some(a), Some(b)] => return Ok((a, b, true)),
        [Some(_), Some(_), ..] => bail!("`{module}` has the adapter of a linear and that of an embedding"),
        [_, _, _, Some(_), _] => PARTS[4],
        [_, _, _, _, Some(_)] => PARTS[3],
        [Some(_), ..] => PARTS[1],
        _ => PARTS[0],
    };
    bail!("`{module}` has half an adapter: {missing} is missing")
}

/// Folds every adapter of a checkpoint into the weight it belongs to: `W + scaling * B A` for each `W` that has
/// `lora_A.weight` and `lora_B.weight` beside it (and DoRA's magnitude, where there is one), `W + scaling * (B A)^T` for
/// an embedding that has `lora_embedding_A` and `lora_embedding_B`, in f32, rounded once to the dtype of `W`. `config` says the scaling of each module. The other tensors pass as they are; names and order stay,
/// without the adapters'.
///
/// For the adapter folder of another program, chain its tensors, without their `base_model.model.`, to those of the
/// base.
///
/// # Errors
/// Names a half without its other half, and an adapter whose weight is missing or of another shape.
pub fn merge_state_dict(
    tensors: impl IntoIterator<Item = (String, Tensor)>,
    config: &LoraConfig,
) -> Result<Vec<(String, Tensor)>> {
    let mut merged = Vec::new();
    let mut adapters: BTreeMap<String, BTreeMap<String, Parts>> = BTreeMap::new(); // by module, by name
    for (name, tensor) in tensors {
        match Part::parse(&name) {
            Some(Part { module, adapter, part }) => {
                let parts = adapters.entry(module).or_default().entry(adapter).or_default();
                if parts[part].replace(tensor).is_some() {
                    bail!("two tensors are named `{name}`");
                }
            }
            None => merged.push((name, tensor)),
        }
    }
    let places: BTreeMap<String, usize> = merged.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect();
    for (module, adapters) in adapters {
        let place = [format!("{module}.weight"), format!("{module}.base_layer.weight")]
            .iter()
            .find_map(|name| places.get(name).copied())
            .with_context(|| format!("`{module}` has an adapter but no weight"))?;
        let (name, weight) = &merged[place];
        let mut sum = weight.to_kind(Kind::Float).copy();
        let scaling = config.rank(&module)?.scaling;
        for parts in adapters.into_values() {
            let (a, b, is_embedding) = halves(&module, &parts)?;
            let (a_shape, b_shape, shape) = (a.size(), b.size(), weight.size());
            let turned = |tensor: &Tensor| if is_embedding { tensor.tr() } else { tensor.shallow_clone() };
            let two = a.dim() == 2 && b.dim() == 2 && weight.dim() == 2;
            let fit = two && a_shape[0] == b_shape[1] && turned(weight).size() == [b_shape[0], a_shape[1]];
            ensure!(fit, "`{name}` is {shape:?}, its adapter is A {a_shape:?} and B {b_shape:?}");
            let magnitude = &parts[2];
            if let Some(magnitude) = magnitude {
                let (found, out, what) = (magnitude.size(), b_shape[0], if is_embedding { "columns" } else { "rows" });
                ensure!(found == [out], "`{module}.{MAGNITUDE}` is {found:?}, its weight has {out} {what}");
            }
            let on_device = |tensor: &Tensor| tensor.detach().to_device(weight.device());
            let (a, b, magnitude) = (on_device(a), on_device(b), magnitude.as_ref().map(on_device));
            sum = sum.g_add_(&turned(&delta_weight(&turned(weight), &a, &b, scaling, magnitude.as_ref())));
        }
        merged[place].1 = sum.to_kind(merged[place].1.kind());
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fixtures::{Golden, assert_close_to};

    fn named(golden: &Golden, pairs: &[(&str, &str)]) -> Vec<(String, Tensor)> {
        pairs.iter().map(|(to, from)| ((*to).to_owned(), golden[from].shallow_clone())).collect()
    }

    #[test]
    fn matches_the_reference_by_name() {
        let golden = fixtures::open("lora");
        let tensors = named(
            &golden,
            &[
                ("layers.0.weight", "one.weights.weight"),
                ("layers.0.bias", "one.weights.bias"),
                ("layers.0.lora_A.weight", "one.only.lora_A.weight"),
                ("layers.0.lora_B.weight", "one.only.lora_B.weight"),
                ("norm.weight", "peft.weights.model.norm.weight"),
            ],
        );
        let merged = merge_state_dict(tensors, &LoraConfig { lora_alpha: Some(8.0), ..LoraConfig::new(4, 1) }).unwrap();
        let names: Vec<&str> = merged.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["layers.0.weight", "layers.0.bias", "norm.weight"]);
        assert_close_to(&merged[0].1, &golden["one.merged"], 1e-6);
        assert!(merged[2].1.equal(&golden["peft.weights.model.norm.weight"]));
    }

    #[test]
    fn several_adapters_of_one_weight_are_rounded_once() {
        let golden = fixtures::open("lora");
        let (left, right) = (&golden["two.left.delta"], &golden["two.right.delta"]);
        let mut tensors = named(
            &golden,
            &[
                ("q.base_layer.weight", "two.weights.weight"),
                ("q.lora_A.left.weight", "two.left.lora_A.weight"),
                ("q.lora_B.left.weight", "two.left.lora_B.weight"),
                ("q.lora_A.right.weight", "two.right.lora_A.weight"),
                ("q.lora_B.right.weight", "two.right.lora_B.weight"),
            ],
        );
        tensors[0].1 = tensors[0].1.to_kind(Kind::BFloat16);
        let expected = (tensors[0].1.to_kind(Kind::Float) + left + right / 2.5).to_kind(Kind::BFloat16);
        let merged = merge_state_dict(tensors, &LoraConfig::new(2, 1)).unwrap();
        assert_eq!(
            (merged.len(), merged[0].0.as_str(), merged[0].1.kind()),
            (1, "q.base_layer.weight", Kind::BFloat16)
        );
        let unequal = merged[0].1.not_equal_tensor(&expected).sum(Kind::Int64).int64_value(&[]);
        assert!(unequal <= 1, "{unequal} weights are rounded otherwise"); // the sum's order may decide a tie
    }

    #[test]
    fn an_embedding_is_the_linear_turned_over() {
        let golden = fixtures::open("lora");
        let one = |names: [&str; 3], turned: bool| {
            let mut tensors = named(
                &golden,
                &[
                    (names[0], "one.weights.weight"),
                    (names[1], "one.only.lora_A.weight"),
                    (names[2], "one.only.lora_B.weight"),
                ],
            );
            let out = tensors[0].1.size()[0];
            tensors.push((
                "e.lora_magnitude_vector".into(),
                Tensor::linspace(0.5, 2.0, out, (Kind::Float, tch::Device::Cpu)),
            ));
            if turned {
                tensors[0].1 = tensors[0].1.tr();
            }
            tensors
        };
        let config = LoraConfig { lora_alpha: Some(8.0), ..LoraConfig::new(4, 1) };
        // In PEFT's file, and as PEFT names them in memory.
        for [a, b] in [["lora_embedding_A", "lora_embedding_B"], ["lora_embedding_A.x", "lora_embedding_B.x"]] {
            let (a, b) = (format!("e.{a}"), format!("e.{b}"));
            let mut embedding = one(["e.weight", &a, &b], true);
            let dora = embedding.pop().unwrap();
            let merged = merge_state_dict(embedding, &config).unwrap();
            assert_eq!((merged.len(), merged[0].0.as_str()), (1, "e.weight"));
            assert_close_to(&merged[0].1.tr(), &golden["one.merged"], 1e-6);
            if a.ends_with("_A") {
                let mut embedding = one(["e.weight", &a, &b], true);
                let linear = one(["e.weight", "e.lora_A.weight", "e.lora_B.weight"], false);
                *embedding.last_mut().unwrap() = dora;
                let [embedding, linear] =
                    [embedding, linear].map(|tensors| merge_state_dict(tensors, &config).unwrap());
                assert_close_to(&embedding[0].1.tr(), &linear[0].1, 1e-6);
                let difference = (&linear[0].1 - &golden["one.merged"]).abs().max().double_value(&[]);
                assert!(difference > 0.1, "the magnitude changes something: {difference}");
            }
        }
    }

    #[test]
    fn errors_name_the_module() {
        let t = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, tch::Device::Cpu));
        let (a, b) = (("q.lora_A.weight", t(&[2, 4])), ("q.lora_B.weight", t(&[6, 2])));
        let pair = |x: &(&'static str, Tensor)| (x.0.to_owned(), x.1.shallow_clone());
        let weight = |shape| ("q.weight".to_owned(), t(shape));
        let embedding = |half: &str, shape: &[i64]| (format!("q.lora_embedding_{half}"), t(shape));
        let cases = [
            (vec![weight(&[6, 4]), pair(&a)], "`q` has half an adapter: lora_B is missing"),
            (vec![weight(&[6, 4]), pair(&b)], "`q` has half an adapter: lora_A is missing"),
            (vec![pair(&a), pair(&b)], "`q` has an adapter but no weight"),
            (vec![weight(&[6, 5]), pair(&a), pair(&b)], "`q.weight` is [6, 5], its adapter is A [2, 4] and B [6, 2]"),
            (vec![pair(&a), pair(&a)], "two tensors are named `q.lora_A.weight`"),
            (
                vec![weight(&[6, 4]), pair(&a), pair(&b), ("q.lora_magnitude_vector".to_owned(), t(&[4]))],
                "`q.lora_magnitude_vector` is [4], its weight has 6 rows",
            ),
            (vec![weight(&[4, 6]), embedding("A", &[2, 4])], "`q` has half an adapter: lora_embedding_B is missing"),
            (vec![weight(&[4, 6]), embedding("B", &[6, 2])], "`q` has half an adapter: lora_embedding_A is missing"),
            (
                vec![weight(&[6, 4]), embedding("A", &[2, 4]), embedding("B", &[6, 2])],
                "`q.weight` is [6, 4], its adapter is A [2, 4] and B [6, 2]",
            ),
            (
                vec![weight(&[6, 4]), pair(&a), pair(&b), embedding("A", &[2, 4])],
                "`q` has the adapter of a linear and that of an embedding",
            ),
            (
                vec![
                    weight(&[4, 6]),
                    embedding("A", &[2, 4]),
                    embedding("B", &[6, 2]),
                    ("q.lora_magnitude_vector".to_owned(), t(&[4])),
                ],
                "`q.lora_magnitude_vector` is [4], its weight has 6 columns",
            ),
        ];
        for (tensors, expected) in cases {
            assert_eq!(merge_state_dict(tensors, &LoraConfig::new(2, 1)).unwrap_err().to_string(), expected);
        }
    }
}
