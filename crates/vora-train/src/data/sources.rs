//! From the run file's `data` to sources of samples.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use vora_data::scenes::{Scenes, ScenesConfig, Split};
use vora_data::{Chain, Mix, RecordFiles, RecordKeys, Sample, SampleMaker, SceneSource, Source};
use vora_recipe::{DataFetch, DataPath, DataPreprocess, EvalData, TrainConfig};

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

impl HeldOut {
    /// The first `samples` samples of `source`, asked about under this name.
    pub fn new(name: impl Into<String>, source: Arc<dyn Source>, samples: u64) -> Self {
        let samples = source.len().map_or(samples, |len| len.min(samples));
        Self { name: name.into(), source, samples }
    }
}

/// Samples of a source of a program's own that are looked at before the first step, and again where the run goes on.
const COMPARED: u64 = 2;

/// Samples that are compared between processes that train together.
const SEEN: u64 = 8;

/// Where a run's samples come from: what its file names, or what a program brings along.
pub struct Sources {
    name: Option<String>, // of a program's own
    training: Arc<dyn Source>,
    held_out: Vec<HeldOut>,
}

impl Sources {
    /// Those that the run file names.
    ///
    /// # Errors
    /// As [`training`] and [`held_out`].
    pub fn open(config: &TrainConfig, maker: &Arc<SampleMaker>) -> Result<Self> {
        Ok(Self { name: None, training: training(config, maker)?, held_out: held_out(config, maker)? })
    }

    /// A program's own, by a name that the run folder keeps (`data.train.source`). A run goes on from a checkpoint by the
    /// numbers of its samples, so the same number has to give the same sample, in another process as well; it is compared.
    pub fn own(name: impl Into<String>, training: Arc<dyn Source>) -> Self {
        Self { name: Some(name.into()), training, held_out: Vec::new() }
    }

    /// The same with a split that is asked about.
    #[must_use]
    pub fn with_held_out(mut self, split: HeldOut) -> Self {
        self.held_out.push(split);
        self
    }

    /// What is learned from.
    pub fn training(&self) -> &Arc<dyn Source> {
        &self.training
    }

    /// Both, apart.
    pub(crate) fn into_parts(self) -> (Arc<dyn Source>, Vec<HeldOut>) {
        (self.training, self.held_out)
    }

    /// The run file of a run on these: where they are a program's own, it names them in place of what it named.
    pub(crate) fn named_in(&self, mut config: TrainConfig) -> TrainConfig {
        let Some(name) = &self.name else { return config };
        let train = &mut config.data.train;
        (train.scenes, train.scenes_weight, train.data_fetch) = (None, None, None);
        train.source = Some(name.clone());
        let split = |split: &HeldOut| {
            let samples = usize::try_from(split.samples).unwrap_or(usize::MAX);
            (split.name.clone(), EvalData { source: Some(name.clone()), samples, ..EvalData::default() })
        };
        config.data.eval = self.held_out.iter().map(split).collect();
        config
    }

    /// What the first samples of a program's own source are known by; none of what a run file names, which its keys tell.
    ///
    /// # Errors
    /// Where one number gives two samples, or samples that the run's loss does not learn from.
    pub(crate) fn fingerprint(&self, config: &TrainConfig) -> Result<Option<String>> {
        let Some(name) = &self.name else { return Ok(None) };
        let mut hash = Sha256::new();
        for index in 0..self.training.len().unwrap_or(COMPARED).min(COMPARED) {
            let (Ok(first), again) = (self.training.sample(index), self.training.sample(index)) else { continue };
            ensure!(
                again.is_ok_and(|again| again == first),
                "the source `{name}` gives two samples for the number {index}: the same number must give the same one, or \
                 no run goes on where it stopped"
            );
            ensure!(
                config.dpo_beta().is_none() || first.questions.iter().any(|question| question.is_rejected),
                "loss is dpo, but sample {} of the source `{name}` has no rejected answer; SampleMaker::of_pairs makes \
                 samples that have one",
                first.id
            );
            add(&mut hash, &first);
        }
        Ok(Some(hex(hash)))
    }

    /// What processes that train on the same files all see of them: how many samples there are, and a digest of some.
    pub(crate) fn seen(&self) -> String {
        let of = |source: &Arc<dyn Source>| {
            let mut hash = Sha256::new();
            let len = source.len().unwrap_or(COMPARED);
            let step = if source.is_stream() { 1 } else { len.div_ceil(SEEN).max(1) };
            for index in (0..len).step_by(usize::try_from(step).unwrap_or(usize::MAX)).take(SEEN as usize) {
                match source.sample(index) {
                    Ok(sample) => add(&mut hash, &sample),
                    Err(_) => hash.update("bad"),
                }
            }
            let records = source.len().map_or("records without end".to_owned(), |len| format!("{len} records"));
            format!("{records} with the digest {}", &hex(hash)[..12])
        };
        let all = std::iter::once(&self.training).chain(self.held_out.iter().map(|split| &split.source));
        all.map(of).collect::<Vec<_>>().join(", ")
    }
}

/// Adds all that a model is shown of a sample.
fn add(hash: &mut Sha256, sample: &Sample) {
    hash.update(format!("{} {:?} {:?} {:?}", sample.id, sample.input_ids, sample.targets, sample.spans));
    for pixels in &sample.images {
        hash.update(format!("{} {}", pixels.height, pixels.width));
        pixels.data.iter().for_each(|value| hash.update(value.to_le_bytes()));
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A refusal of data that only a program has.
fn not_here<T>(key: &str, source: &str) -> Result<T> {
    bail!(
        "{key}.source is `{source}`: a program of its own brings this data along, by Trainer::with_data of vora-train"
    )
}

/// What is learned from: pairs of answers where the loss is on those.
///
/// # Errors
/// Names the file or folder that cannot be read, or the weight that is wrong.
pub fn training(config: &TrainConfig, maker: &Arc<SampleMaker>) -> Result<Arc<dyn Source>> {
    let pairs = config.dpo_beta().map(|_| Arc::new(SampleMaker::of_pairs(maker.preparation().clone())));
    let maker = pairs.as_ref().unwrap_or(maker);
    let train = &config.data.train;
    if let Some(source) = &train.source {
        return not_here("data.train", source);
    }
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
        if let Some(source) = &eval.source {
            return not_here(&format!("data.eval.{name}"), source);
        }
        let source = match (&eval.data_fetch, eval.split) {
            (Some(fetch), _) => annotated(fetch, &preprocess(config), maker),
            (None, split) => {
                let asked = eval.scenes(config.data.train.scenes.clone().unwrap_or_default());
                scenes(asked, split.unwrap_or(Split::Test), maker)
            }
        };
        let source = source.with_context(|| format!("data.eval.{name}"))?;
        splits.push(HeldOut::new(name, source, eval.samples as u64));
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
