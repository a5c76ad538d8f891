//! From the run file's `data` to sources of samples.

use std::sync::Arc;

use anyhow::{Context, Result};
use vora_data::scenes::{Scenes, ScenesConfig, Split};
use vora_data::{Chain, Mix, RecordFiles, RecordKeys, SampleMaker, SceneSource, Source};
use vora_recipe::{DataFetch, DataPath, DataPreprocess, TrainConfig};

/// A held-out split.
#[non_exhaustive]
pub struct HeldOut {
    /// Its name in reports.
    pub name: String,
    /// Its samples.
    pub source: Arc<dyn Source>,
    /// How many of them are asked about.
    pub samples: u64,
}

/// What is learned from: pairs of answers where the loss is on those.
///
/// # Errors
/// Names the file or folder that cannot be read, or the weight that is wrong.
pub fn training(config: &TrainConfig, maker: &Arc<SampleMaker>) -> Result<Arc<dyn Source>> {
    let pairs = config.dpo_beta().map(|_| Arc::new(SampleMaker::of_pairs(maker.preparation().clone())));
    let maker = pairs.as_ref().unwrap_or(maker);
    let train = &config.data.train;
    let procedural = || scenes(train.scenes.clone().unwrap_or_default(), Split::Train, maker);
    let Some(fetch) = &train.data_fetch else { return procedural() };
    if !fetch.has_weights() {
        return annotated(fetch, &preprocess(config), maker).context("data.train");
    }
    let mut sources = Vec::new();
    for path in &fetch.data_paths {
        let files = one(files(path, &preprocess(config), maker).context("data.train")?)?;
        sources.push((path.weight.unwrap_or(1.0), files));
    }
    if let Some(weight) = train.scenes_weight {
        sources.push((weight, procedural()?));
    }
    Ok(Arc::new(Mix::by_weight(sources).context("data.train")?))
}

/// What is asked afterwards, in the order of the splits' names.
///
/// # Errors
/// Names the split, and the file or folder that cannot be read.
pub fn held_out(config: &TrainConfig, maker: &Arc<SampleMaker>) -> Result<Vec<HeldOut>> {
    let mut splits = Vec::new();
    for (name, eval) in &config.data.eval {
        let source = match (&eval.data_fetch, eval.split) {
            (Some(fetch), _) => annotated(fetch, &preprocess(config), maker),
            (None, split) => {
                let asked = eval.scenes(config.data.train.scenes.clone().unwrap_or_default());
                scenes(asked, split.unwrap_or(Split::Test), maker)
            }
        };
        let source = source.with_context(|| format!("data.eval.{name}"))?;
        let samples = eval.samples as u64;
        splits.push(HeldOut { name: name.clone(), samples: source.len().map_or(samples, |n| n.min(samples)), source });
    }
    Ok(splits)
}

/// Records that a section other than `data` names.
///
/// # Errors
/// Names the file or folder that cannot be read.
pub(crate) fn of_fetch(fetch: &DataFetch, config: &TrainConfig, maker: &Arc<SampleMaker>) -> Result<Arc<dyn Source>> {
    annotated(fetch, &preprocess(config), maker)
}

fn preprocess(config: &TrainConfig) -> DataPreprocess {
    config.data.train.data_preprocess.clone().unwrap_or_default()
}

fn scenes(config: ScenesConfig, split: Split, maker: &Arc<SampleMaker>) -> Result<Arc<dyn Source>> {
    Ok(Arc::new(SceneSource::new(Scenes::new(config, split)?, maker.clone())))
}

fn annotated(fetch: &DataFetch, preprocess: &DataPreprocess, maker: &Arc<SampleMaker>) -> Result<Arc<dyn Source>> {
    let mut sources = Vec::new();
    for path in &fetch.data_paths {
        sources.extend(files(path, preprocess, maker)?);
    }
    one(sources)
}

/// The sources of one entry of `data_paths`.
fn files(path: &DataPath, preprocess: &DataPreprocess, maker: &Arc<SampleMaker>) -> Result<Vec<Arc<dyn Source>>> {
    let keys = RecordKeys { frames: preprocess.frames_key.clone(), conversations: preprocess.label_key.clone() };
    RecordFiles { path: path.anno_path.clone(), image_folder: path.image_folder.clone(), keys }.open(maker)
}

/// Several sources as one, each record once a pass.
fn one(mut sources: Vec<Arc<dyn Source>>) -> Result<Arc<dyn Source>> {
    Ok(match sources.len() {
        1 => sources.remove(0),
        _ if sources.iter().any(|source| source.is_stream()) => Arc::new(Mix::by_length(sources)?),
        _ => Arc::new(Chain::new(sources)),
    })
}
