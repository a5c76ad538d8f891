//! Adapters for all linears of a model that a configuration names.

use anyhow::{Result, ensure};
use vora_torch::weights::Weights;

use crate::config::{ALL_LAYERS, LoraConfig, in_layer, names};
use crate::linear::Linear;
use crate::pattern::matches_end;

/// What a model calls once for every linear it has, with its path (`model.layers.0.self_attn.q_proj`, `fc1`).
pub type Visit<'a> = dyn FnMut(&str, &mut Linear) -> Result<()> + 'a;

/// Puts the adapter `name` on every linear that `config` asks for, and says how many that were.
///
/// `linears` is the model's walk over its linears. Below `weights` an adapter lies where its linear lies in the model: `A` of
/// `model.layers.0.self_attn.q_proj` is `model.layers.0.self_attn.q_proj.lora_A.weight`.
///
/// Targets and patterns are matched with the whole path, the place of `weights` included, so that a target may also name
/// one linear of one layer. The layer is the first number in a path; a linear that lies in none is adapted where all layers
/// are, or where a target is its whole path.
///
/// # Errors
/// Where a target names no linear of the first layers, a pattern none that gets an
/// adapter, or where the model has fewer layers than asked for; they tell what there is.
pub fn attach_all(
    name: &str,
    config: &LoraConfig,
    weights: &Weights,
    linears: impl FnOnce(&mut Visit<'_>) -> Result<()>,
) -> Result<usize> {
    config.validate()?;
    let most = config.layers;
    let mut num_layers = 0;
    let mut modules: Vec<String> = Vec::new(); // that may carry adapters, by their paths within a layer
    let (mut paths, mut adapted): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new()); // of their linears
    linears(&mut |path, linear| {
        let (layer, module) = in_layer(path);
        num_layers = num_layers.max(layer.map_or(0, |layer| layer + 1));
        let weights = weights.pp(path);
        if !config.reaches(weights.path()) {
            return Ok(());
        }
        if !modules.iter().any(|known| known == module) {
            modules.push(module.to_owned());
        }
        if config.targets(weights.path()) {
            linear.attach(name, config, &weights)?;
            adapted.push(weights.path().to_owned());
        }
        paths.push(weights.path().to_owned());
        Ok(())
    })?;
    ensure!(most <= num_layers || most == ALL_LAYERS, "lora.layers is {most}, the model has {num_layers} layers");
    let unmatched: Vec<&str> = config
        .target_modules
        .iter()
        .filter(|target| !paths.iter().any(|path| names(target, path)))
        .map(String::as_str)
        .collect();
    ensure!(
        unmatched.is_empty(),
        "lora.target_modules: {} match no linear layer of the model, which has {}",
        some_of(&unmatched),
        if modules.is_empty() { "none in a numbered layer".to_owned() } else { modules.join(", ") }
    );
    for (key, pattern) in config.patterns() {
        let mut used = false;
        for path in &adapted {
            used = used || matches_end(pattern, path)?;
        }
        ensure!(used, "{key}: `{pattern}` matches no linear layer that gets an adapter, as {}", adapted[0]);
    }
    Ok(adapted.len())
}

/// A few names of what may be hundreds.
fn some_of(names: &[&str]) -> String {
    match names {
        [a, b, c, _, rest @ ..] => format!("{:?} and {} more", [a, b, c], rest.len() + 1),
        _ => format!("{names:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// Two layers of two linears.
    fn model() -> Vec<[(&'static str, Linear); 2]> {
        let weights = Weights::random(1, Device::Cpu, Kind::Float);
        let linear = |name| (name, Linear::load(&weights.pp(name), 4, 6, false).unwrap());
        (0..2).map(|_| [linear("self_attn.q_proj"), linear("mlp.up_proj")]).collect()
    }

    fn attach(model: &mut [[(&'static str, Linear); 2]], config: &LoraConfig) -> Result<(usize, Weights)> {
        let weights = Weights::random(2, Device::Cpu, Kind::Float);
        let attached = attach_all("sight", config, &weights, |visit| {
            for (layer_idx, layer) in model.iter_mut().enumerate() {
                for (module, linear) in layer {
                    visit(&format!("model.layers.{layer_idx}.{module}"), linear)?;
                }
            }
            Ok(())
        })?;
        Ok((attached, weights))
    }

    fn config(layers: i64, targets: &[&str]) -> LoraConfig {
        LoraConfig { target_modules: targets.iter().map(|t| (*t).to_owned()).collect(), ..LoraConfig::new(2, layers) }
    }

    #[test]
    fn the_first_layers_get_adapters_under_their_names() {
        let mut model = model();
        let (attached, weights) = attach(&mut model, &config(1, &["q_proj", "mlp.up_proj"])).unwrap();
        assert_eq!(attached, 2);
        let names: Vec<String> = weights.parameters().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names[0], "model.layers.0.self_attn.q_proj.lora_A.weight");
        assert_eq!(names[3], "model.layers.0.mlp.up_proj.lora_B.weight");
        assert_eq!(model[0][1].1.adapters().map(|a| a.name()).collect::<Vec<_>>(), ["sight"]);
        assert_eq!(model[1][1].1.num_adapter_parameters(), 0);
    }

    #[test]
    fn one_linear_of_one_layer_may_be_named() {
        let mut model = model();
        let config = LoraConfig {
            rank_pattern: [("1.mlp.up_proj".into(), 3)].into(),
            ..config(2, &["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"])
        };
        assert_eq!(attach(&mut model, &config).unwrap().0, 2);
        let r = |layer: usize, linear: usize| model[layer][linear].1.adapters().map(|a| a.r()).next();
        assert_eq!([r(0, 0), r(0, 1), r(1, 0), r(1, 1)], [Some(2), None, None, Some(3)]);
    }

    /// A model without layers, as people have them beside the ones here.
    #[test]
    fn linears_that_lie_in_no_layer_get_adapters_where_all_layers_do() {
        let source = Weights::random(1, Device::Cpu, Kind::Float);
        let attached = |config: &LoraConfig| {
            let mut model = ["fc1", "head.fc2"].map(|path| (path, Linear::load(&source, 4, 6, false).unwrap()));
            let weights = Weights::random(2, Device::Cpu, Kind::Float);
            attach_all("a", config, &weights, |visit| {
                model.iter_mut().try_for_each(|(path, linear)| visit(path, linear))
            })?;
            anyhow::Ok(weights.parameters().into_iter().map(|(name, _)| name).collect::<Vec<_>>())
        };
        let found = attached(&LoraConfig::of_modules(2, ["fc2"])).unwrap();
        assert_eq!(found, ["head.fc2.lora_A.weight", "head.fc2.lora_B.weight"]);
        assert_eq!(attached(&config(ALL_LAYERS, &["fc1", "fc2"])).unwrap().len(), 4);
        let error = attached(&config(1, &["fc1"])).unwrap_err().to_string();
        assert_eq!(error, "lora.layers is 1, the model has 0 layers");
    }

    #[test]
    fn errors_tell_what_there_is() {
        let cases = [
            (config(2, &["q_proj", "qv_proj"]), r#"["qv_proj"] match no linear layer of the model"#),
            (config(2, &["v"]), "which has self_attn.q_proj, mlp.up_proj"),
            (config(3, &["q_proj"]), "lora.layers is 3, the model has 2 layers"),
            (config(0, &["q_proj"]), "lora.layers is 0"),
            (config(2, &["a", "b", "c", "d", "e"]), r#"["a", "b", "c"] and 2 more match no linear"#),
            (config(1, &["1.mlp.up_proj"]), r#"["1.mlp.up_proj"] match no linear layer"#),
            (
                LoraConfig { rank_pattern: [("v_proj".into(), 3)].into(), ..config(2, &["q_proj"]) },
                "lora.rank_pattern: `v_proj` matches no linear layer that gets an adapter, as model.layers.0.self_attn.q_proj",
            ),
        ];
        for (config, expected) in cases {
            let error = attach(&mut model(), &config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_name_is_taken_once() {
        let mut model = model();
        attach(&mut model, &config(2, &["q_proj"])).unwrap();
        let error = attach(&mut model, &config(2, &["q_proj"])).unwrap_err().to_string();
        assert_eq!(error, "model.layers.0.self_attn.q_proj already carries an adapter `sight`");
    }
}
