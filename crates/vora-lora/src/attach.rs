//! Adapters for all linears of a model that a configuration names.

use anyhow::{Result, ensure};
use vora_torch::weights::Weights;

use crate::config::{ALL_LAYERS, LoraConfig, names};
use crate::linear::Linear;
use crate::pattern::matches_end;

/// What a model calls once for every linear it has: layer, path within the layer (`self_attn.q_proj`), linear.
pub type Visit<'a> = dyn FnMut(usize, &str, &mut Linear) -> Result<()> + 'a;

/// Puts the adapter `name` on every linear that `config` asks for, and says how many that were.
///
/// `linears` is the model's walk over its linears. `layers` is where in the source of the adapters' weights the
/// layers lie: `A` of layer 0's `self_attn.q_proj` is `0.self_attn.q_proj.lora_A.weight` there.
///
/// Targets and patterns are matched with the whole path, the place of `layers` included, so that a target may also name
/// one linear of one layer.
///
/// # Errors
/// Where a target names no linear of the first layers, a pattern none that gets an
/// adapter, or where the model has fewer layers than asked for; they tell what there is.
pub fn attach_all(
    name: &str,
    config: &LoraConfig,
    layers: &Weights,
    linears: impl FnOnce(&mut Visit<'_>) -> Result<()>,
) -> Result<usize> {
    config.validate()?;
    let most = config.layers;
    let mut num_layers = 0;
    let mut modules: Vec<String> = Vec::new(); // of the layers that may carry adapters
    let (mut paths, mut adapted): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new()); // of their linears
    linears(&mut |layer_idx, module, linear| {
        num_layers = num_layers.max(layer_idx as i64 + 1);
        if layer_idx as i64 >= most {
            return Ok(());
        }
        if !modules.iter().any(|known| known == module) {
            modules.push(module.to_owned());
        }
        let weights = layers.pp(layer_idx).pp(module);
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
        modules.join(", ")
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
        let attached = attach_all("sight", config, &weights.pp("model.layers"), |visit| {
            for (layer_idx, layer) in model.iter_mut().enumerate() {
                for (module, linear) in layer {
                    visit(layer_idx, module, linear)?;
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
