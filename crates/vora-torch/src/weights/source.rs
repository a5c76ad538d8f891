//! A source of weights that walks a checkpoint's own names, or makes new ones from a seed.

use std::cell::{RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::Checkpoint;
use crate::dist::Shards;
use crate::error;
use crate::packed::PackedLinear;
use crate::weights::init::{Init, new_tensor};
use crate::weights::mismatch::Mismatch;
use crate::weights::pack_quantized;
use crate::weights::quantized::Quantization;

/// Where tensors come from.
#[derive(Debug)]
enum Source {
    File(Checkpoint),
    Tensors(HashMap<String, Tensor>),
    New { seed: u64 },
    Shapes,
}

/// What happened so far: asked for, registered, wrong.
#[derive(Debug, Default)]
struct Ledger {
    parameters: Vec<(String, Tensor)>,
    asked: BTreeMap<String, Option<Vec<i64>>>, // with the shapes of those that the model has a use for
    missing: Vec<String>,
    misshapen: Vec<(String, Vec<i64>, Vec<i64>)>,
    aliases: HashMap<String, String>, // names in the checkpoint, by those that are asked for
}

/// A source of weights and a place in its tree of names; clones share the source.
///
/// Frozen tensors come from [`Weights::get`] in the dtype asked for (on the CPU a view of the mapped file where the
/// dtypes agree); trained ones from [`Weights::parameter`] as f32 masters. A name that the checkpoint lacks is noted
/// and stood in for, so that [`Weights::finish`] can tell everything that does not fit in one error. What is frozen and
/// what is trained is the module's choice; [`Weights::trained`] makes all of it trained.
#[derive(Debug, Clone)]
pub struct Weights {
    source: Rc<Source>,
    ledger: Rc<RefCell<Ledger>>,
    path: String,
    device: Device,
    kind: Kind,
    trained: bool,
    frozen: Rc<BTreeSet<String>>, // full names that stay frozen where the rest is trained
    initializer_range: f64,
    quantization: Option<Quantization>,
    keeps_blocks: bool,
    shards: Option<Arc<Shards>>,
}

impl Weights {
    /// Opens a folder or file of safetensors, or the GGUF file of a language model.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open(path: &Path, device: Device, kind: Kind) -> Result<Self> {
        Ok(Self::new(Source::File(Checkpoint::open(path)?), device, kind))
    }

    /// Makes every tensor new from its [`Init`]; its values depend on `seed` and its full name alone.
    pub fn random(seed: u64, device: Device, kind: Kind) -> Self {
        Self::new(Source::New { seed }, device, kind)
    }

    /// Makes tensors of any name of their shapes alone, over a single zero each: of a model that is counted before its weights
    /// are there. They take no memory, and nothing can be written to them. What was asked for counts as stored.
    pub fn shapes(kind: Kind) -> Self {
        Self::new(Source::Shapes, Device::Cpu, kind)
    }

    /// Whether its tensors hold numbers; those of [`Weights::shapes`] do not.
    pub fn has_numbers(&self) -> bool {
        !matches!(*self.source, Source::Shapes)
    }

    /// Takes tensors from memory, as tests do.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, Tensor)>, device: Device, kind: Kind) -> Self {
        Self::new(Source::Tensors(tensors.into_iter().collect()), device, kind)
    }

    fn new(source: Source, device: Device, kind: Kind) -> Self {
        let (source, ledger) = (Rc::new(source), Rc::default());
        Self {
            source,
            ledger,
            path: String::new(),
            device,
            kind,
            trained: false,
            frozen: Rc::default(),
            initializer_range: 0.02,
            quantization: None,
            keeps_blocks: false,
            shards: None,
        }
    }

    /// The same source one step down: `weights.pp("layers").pp(0)`.
    pub fn pp(&self, name: impl Display) -> Self {
        Self { path: self.full_name(&name.to_string()), ..self.clone() }
    }

    /// The same source for a model all of whose weights are trained: [`Weights::get`] gives what [`Weights::parameter`]
    /// gives. [`Weights::kind`] stays the dtype that such a model computes in, as mixed precision has it: its masters are
    /// f32, cast where they meet activations of another dtype.
    ///
    /// For a language model that learns with what is put before it (LLaVA's second stage), or from nothing (Chameleon).
    #[must_use]
    pub fn trained(&self) -> Self {
        Self { trained: true, ..self.clone() }
    }

    /// As [`Weights::trained`], but for the tensors of these names from here on, which stay frozen: those that no loss
    /// reaches.
    #[must_use]
    pub fn trained_but(&self, frozen: impl IntoIterator<Item = String>) -> Self {
        let frozen = frozen.into_iter().map(|name| self.full_name(&name)).collect();
        Self { frozen: Rc::new(frozen), ..self.trained() }
    }

    /// The same source with another standard deviation of [`Init::Required`], HF's `initializer_range`; 0.02 at first.
    #[must_use]
    pub fn with_initializer_range(&self, std: f64) -> Self {
        Self { initializer_range: std, ..self.clone() }
    }

    /// The same source for a model whose linear layers, those that can carry adapters, keep their frozen weights in few
    /// bits: quantized from the dtype of this source, one after another. Norms, embedding and head stay as they are.
    ///
    /// # Errors
    /// Where the source is a GGUF file that has tensors in few bits already, and where it has shapes alone.
    pub fn quantized(&self, quantization: Quantization) -> Result<Self> {
        if !self.has_numbers() {
            bail!("few bits are counted from weights: there are none yet");
        }
        if let Source::File(checkpoint) = &*self.source
            && let Some((name, kind)) = checkpoint.quantised()
        {
            bail!(
                "{} is quantised already, `{name}` is {kind}: take the model's safetensors, or a GGUF file in f32, f16 or bf16",
                checkpoint.path().display()
            );
        }
        Ok(Self { quantization: Some(quantization), ..self.clone() })
    }

    /// The same source for a model that answers, on the CPU: linear layers keep the blocks of a GGUF file that decoding reads (Q8_0
    /// and Q4_0) as they are, see [`Weights::packed`]. Blocks of other kinds, and all of them without this, are made whole.
    #[must_use]
    pub fn keeping_blocks(&self) -> Self {
        let is_read = self.device == Device::Cpu && matches!(self.kind, Kind::Float | Kind::BFloat16);
        let has_some = matches!(&*self.source, Source::File(checkpoint) if checkpoint.quantised().is_some());
        Self { keeps_blocks: is_read && has_some, ..self.clone() }
    }

    /// Whether some blocks are kept as they are: [`Weights::keeping_blocks`] of a file that has some.
    pub fn keeps_blocks(&self) -> bool {
        self.keeps_blocks
    }

    /// The same source for a model whose linear layers, those that can carry adapters, keep a share of their frozen weights in
    /// each of several processes ([`ShardedWeight`](crate::dist::ShardedWeight)).
    #[must_use]
    pub fn sharded(&self, shards: &Arc<Shards>) -> Self {
        Self { shards: Some(Arc::clone(shards)), ..self.clone() }
    }

    /// The processes of [`Weights::sharded`].
    pub fn shards(&self) -> Option<&Arc<Shards>> {
        self.shards.as_ref()
    }

    /// The few bits of [`Weights::quantized`].
    pub fn quantization(&self) -> Option<Quantization> {
        self.quantization
    }

    /// Where in the tree this is, `""` at the root.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The device that tensors are put on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The dtype of frozen tensors, and of activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Takes the tensor that the checkpoint has as `stored` where `name` is asked for; both names go on from here.
    pub fn alias(&self, name: &str, stored: &str) {
        self.ledger().aliases.insert(self.full_name(name), self.full_name(stored));
    }

    /// The name that the checkpoint has a tensor under.
    fn stored_name(&self, name: &str) -> String {
        let name = self.full_name(name);
        self.ledger().aliases.get(&name).cloned().unwrap_or(name)
    }

    /// Whether the checkpoint has this tensor; a source of new weights has every one.
    pub fn contains(&self, name: &str) -> bool {
        let name = self.stored_name(name);
        match &*self.source {
            Source::File(checkpoint) => checkpoint.info(&name).is_some(),
            Source::Tensors(tensors) => tensors.contains_key(&name),
            Source::New { .. } | Source::Shapes => true,
        }
    }

    /// The shape that a tensor has in the checkpoint.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let name = self.stored_name(name);
        match &*self.source {
            Source::File(checkpoint) => checkpoint.info(&name).map(|(_, shape)| shape.to_vec()),
            Source::Tensors(tensors) => tensors.get(&name).map(Tensor::size),
            Source::New { .. } | Source::Shapes => None,
        }
    }

    /// The names of all tensors that the checkpoint has below this place, from here on; a source of new weights has none, one
    /// of shapes those that were asked for.
    pub fn names(&self) -> Vec<String> {
        let below = if self.path.is_empty() { String::new() } else { format!("{}.", self.path) };
        let own = |name: &str| name.strip_prefix(&below).map(str::to_owned);
        let mut names: Vec<String> = match &*self.source {
            Source::File(checkpoint) => checkpoint.names().filter_map(own).collect(),
            Source::Tensors(tensors) => tensors.keys().filter_map(|name| own(name)).collect(),
            Source::New { .. } => Vec::new(),
            Source::Shapes => {
                let ledger = self.ledger();
                ledger.asked.iter().filter(|(_, shape)| shape.is_some()).filter_map(|(name, _)| own(name)).collect()
            }
        };
        names.sort();
        names
    }

    /// A tensor as it lies in the checkpoint, in its own dtype; it does not count as asked for. A source of new weights
    /// has none.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn stored_tensor(&self, name: &str) -> Result<Option<Tensor>> {
        let name = self.stored_name(name);
        match &*self.source {
            Source::File(checkpoint) => checkpoint.info(&name).map(|_| checkpoint.tensor(&name)).transpose(),
            Source::Tensors(tensors) => Ok(tensors.get(&name).map(Tensor::shallow_clone)),
            Source::New { .. } => Ok(None),
            Source::Shapes => {
                let shape = self.ledger().asked.get(&name).cloned().flatten();
                shape.map(|shape| stand_in(&shape, self.kind)).transpose()
            }
        }
    }

    /// Every tensor that the checkpoint has below this place, by its name from here on, as it lies there: in its own
    /// dtype, from a file as a view of the mapped memory. None of them counts as asked for. A source of new weights has
    /// none.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn stored(&self) -> Result<Vec<(String, Tensor)>> {
        let mut stored = Vec::new();
        for name in self.names() {
            if let Some(tensor) = self.stored_tensor(&name)? {
                stored.push((name, tensor));
            }
        }
        Ok(stored)
    }

    /// A frozen tensor, in the dtype of this source; a trained one where the source is [`Weights::trained`]. Of a file in
    /// another dtype it is a copy, and the memory that the file's own bytes were read into is given back.
    ///
    /// # Errors
    /// Where a tensor cannot be read or made; one that is missing or misshapen is told by [`Weights::finish`].
    pub fn get(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        if self.trained && !self.frozen.contains(&self.full_name(name)) {
            return self.parameter(name, shape, init);
        }
        let tensor = self.find(name, shape, init, self.kind)?.to_kind(self.kind).to_device(self.device);
        if self.is_copied(name) {
            self.forget(name);
        }
        Ok(tensor)
    }

    /// Whether what is handed out of a tensor is a copy of what the file has.
    fn is_copied(&self, name: &str) -> bool {
        match &*self.source {
            Source::File(checkpoint) => {
                let kind = checkpoint.info(&self.stored_name(name)).map(|(kind, _)| kind);
                self.device != Device::Cpu || kind != Some(self.kind)
            }
            _ => false,
        }
    }

    /// The weight of this name where the source stores it in groups of few bits, as `compressed-tensors` does, or a GGUF file whose
    /// blocks are kept; none where it does not. It is read into memory of its own.
    ///
    /// # Errors
    /// What of that format is not read, by name; a source that is [`Weights::trained`].
    pub fn packed(&self, name: &str, shape: [i64; 2]) -> Result<Option<PackedLinear>> {
        if let (Source::File(checkpoint), true, false) = (&*self.source, self.keeps_blocks, self.trained) {
            let packed = checkpoint.packed(&self.stored_name(name), shape)?;
            if packed.is_some() {
                self.ignore(name);
                return Ok(packed);
            }
        }
        let stored = |part: &str| self.stored_tensor(&format!("{name}{part}"));
        let packed = pack_quantized::read(&self.full_name(name), &stored, shape)?;
        if packed.is_some() {
            for part in pack_quantized::PARTS {
                self.ignore(&format!("{name}{part}"));
                self.forget(&format!("{name}{part}"));
            }
        }
        if packed.is_some() && self.trained && !self.frozen.contains(&self.full_name(name)) {
            bail!(
                "{} is in few bits: weights are trained whole, take the folder that it was quantized from",
                self.full_name(name)
            );
        }
        Ok(packed)
    }

    /// A trained tensor: an f32 leaf that requires gradients, registered under its full name.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn parameter(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let found = self.find(name, shape, init, Kind::Float)?.detach();
        if !self.has_numbers() {
            let tensor = found.set_requires_grad(true);
            self.ledger().parameters.push((self.full_name(name), tensor.shallow_clone()));
            return Ok(tensor);
        }
        let tensor = Tensor::empty(shape, (Kind::Float, self.device));
        tch::no_grad(|| tensor.shallow_clone().copy_(&found));
        self.forget(name);
        let tensor = tensor.set_requires_grad(true);
        self.ledger().parameters.push((self.full_name(name), tensor.shallow_clone()));
        Ok(tensor)
    }

    /// Gives back the memory that the file's own copy of this tensor was read into, for a model that goes on with another
    /// one. On a view of it nothing changes, but that the file is read again.
    pub fn forget(&self, name: &str) {
        if let Source::File(checkpoint) = &*self.source {
            checkpoint.forget(&self.stored_name(name));
        }
    }

    /// Takes a name for known that the model has no use for, so that [`Weights::finish`] lets it pass.
    pub fn ignore(&self, name: &str) {
        let name = self.stored_name(name);
        self.ledger().asked.insert(name, None);
    }

    /// All trained tensors handed out so far, by full name, in the order of their making.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.ledger().parameters.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
    }

    /// Checks that checkpoint and model fit each other; call it when the model is built.
    ///
    /// # Errors
    /// A [`Mismatch`] that lists everything missing, unexpected and misshapen.
    pub fn finish(&self) -> Result<()> {
        self.finish_allowing(|_| false)
    }

    /// As [`Weights::finish`], but lets unexpected names pass for which `allowed` is true.
    ///
    /// # Errors
    /// As [`Weights::finish`].
    pub fn finish_allowing(&self, allowed: impl Fn(&str) -> bool) -> Result<()> {
        let ledger = self.ledger();
        let names: Vec<&str> = match &*self.source {
            Source::File(checkpoint) => checkpoint.names().collect(),
            Source::Tensors(tensors) => tensors.keys().map(String::as_str).collect(),
            Source::New { .. } | Source::Shapes => Vec::new(),
        };
        let mut unexpected: Vec<String> = names
            .into_iter()
            .filter(|name| !ledger.asked.contains_key(*name) && !allowed(name))
            .map(str::to_owned)
            .collect();
        unexpected.sort();
        let (missing, misshapen) = (ledger.missing.clone(), ledger.misshapen.clone());
        if missing.is_empty() && unexpected.is_empty() && misshapen.is_empty() {
            return Ok(());
        }
        Err(Mismatch { path: self.origin(), missing, unexpected, misshapen }.into())
    }

    /// The file or folder that this source reads, for messages.
    pub fn origin(&self) -> PathBuf {
        match &*self.source {
            Source::File(checkpoint) => checkpoint.path().to_owned(),
            Source::Tensors(_) => "tensors in memory".into(),
            Source::New { .. } => "new weights".into(),
            Source::Shapes => "shapes without weights".into(),
        }
    }

    fn ledger(&self) -> RefMut<'_, Ledger> {
        self.ledger.borrow_mut()
    }

    fn full_name(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The tensor of that name on the CPU (or where it already is), or a stand-in when it is missing or misshapen. Only
    /// a file's is in `kind`.
    fn find(&self, name: &str, shape: &[i64], init: Init, kind: Kind) -> Result<Tensor> {
        let name = self.stored_name(name);
        self.ledger().asked.insert(name.clone(), Some(shape.to_vec()));
        let found = match &*self.source {
            Source::New { seed } => {
                return new_tensor(*seed, &name, shape, init, self.initializer_range)
                    .with_context(|| format!("making tensor `{name}`"));
            }
            Source::Shapes => return stand_in(shape, kind),
            Source::File(checkpoint) => checkpoint.info(&name).map(|(_, shape)| shape.to_vec()),
            Source::Tensors(tensors) => tensors.get(&name).map(Tensor::size),
        };
        match found {
            Some(found) if found == shape => match &*self.source {
                Source::File(checkpoint) => checkpoint.tensor_as(&name, kind),
                Source::Tensors(tensors) => Ok(tensors[&name].shallow_clone()),
                Source::New { .. } | Source::Shapes => unreachable!("returned above"),
            },
            Some(found) => {
                self.ledger().misshapen.push((name, found, shape.to_vec()));
                stand_in(shape, kind)
            }
            None => {
                self.ledger().missing.push(name);
                stand_in(shape, kind)
            }
        }
    }
}

/// A tensor of that shape over a single zero, for a model that will not be used.
fn stand_in(shape: &[i64], kind: Kind) -> Result<Tensor> {
    Tensor::zeros([1], (kind, Device::Cpu)).f_as_strided(shape, vec![0; shape.len()], 0).map_err(error::clean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::save;

    fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn everything_that_does_not_fit_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let tensors = [("a.weight", zeros(&[2, 3])), ("b.weight", zeros(&[4])), ("extra", zeros(&[1]))];
        save(&path, &tensors.map(|(n, t)| (n.to_owned(), t)), &[]).unwrap();

        let weights = Weights::open(folder.path(), Device::Cpu, Kind::Float).unwrap();
        assert_eq!(weights.pp("a").get("weight", &[2, 3], Init::Required).unwrap().size(), [2, 3]);
        assert_eq!(weights.pp("b").get("weight", &[5], Init::Required).unwrap().size(), [5]);
        assert_eq!(weights.pp("c").parameter("weight", &[1 << 10, 2], Init::Zeros).unwrap().size(), [1 << 10, 2]);
        let error = weights.finish().unwrap_err();
        assert_eq!(
            error.downcast_ref::<Mismatch>().unwrap(),
            &Mismatch {
                path: folder.path().to_owned(),
                missing: vec!["c.weight".into()],
                unexpected: vec!["extra".into()],
                misshapen: vec![("b.weight".into(), vec![4], vec![5])],
            }
        );
        let text = error.to_string();
        assert!(text.contains("misshapen  b.weight is [4], the model expects [5]"), "{text}");
        let weights = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
        weights.finish_allowing(|_| true).unwrap();
    }

    #[test]
    fn shapes_alone_take_no_memory() {
        let weights = Weights::shapes(Kind::BFloat16);
        let shape = [1 << 20, 1 << 20]; // two TiB
        let tensor = weights.pp("a").get("weight", &shape, Init::Required).unwrap();
        assert_eq!((tensor.size(), tensor.kind(), tensor.numel()), (shape.to_vec(), Kind::BFloat16, 1 << 40));
        assert!(weights.contains("b") && !weights.has_numbers());
        let trained = weights.pp("a").parameter("lora_A", &shape, Init::Required).unwrap();
        assert!(trained.requires_grad() && trained.is_leaf() && trained.kind() == Kind::Float);
        assert_eq!((trained.size(), weights.parameters().len()), (shape.to_vec(), 1));
        weights.ignore("c");
        let stored = weights.pp("a").stored().unwrap();
        let stored: Vec<_> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor.numel())).collect();
        assert_eq!(stored, [("lora_A", 1 << 40), ("weight", 1 << 40)]);
        assert!(weights.quantized(Quantization::Nf4).unwrap_err().to_string().starts_with("few bits are counted"));
        weights.finish().unwrap();
    }

    #[test]
    fn a_long_list_is_shown_by_ten_names_and_a_count() {
        let weights = Weights::from_tensors([], Device::Cpu, Kind::Float);
        for idx in 0..12 {
            let _ = weights.get(&format!("{idx:02}.weight"), &[1], Init::Required).unwrap();
        }
        let error = weights.finish().unwrap_err();
        let lines: Vec<String> = error.to_string().lines().map(str::to_owned).collect();
        assert_eq!(
            (lines.len(), &*lines[10], &*lines[11]),
            (12, "  missing    09.weight", "  missing    and 2 more, 12 in all")
        );
        assert_eq!(error.downcast_ref::<Mismatch>().unwrap().missing.len(), 12);
    }

    #[test]
    fn an_alias_stands_for_a_name_of_the_checkpoint() {
        let value = fixtures::Random::new(1).normal([2]);
        let weights = Weights::from_tensors([("llm.norm".to_owned(), value.copy())], Device::Cpu, Kind::Float);
        let llm = weights.pp("llm");
        assert!(!llm.contains("model.norm"));
        llm.alias("model.norm", "norm");
        assert!(llm.contains("model.norm") && llm.pp("model").shape("norm") == Some(vec![2]));
        assert!(llm.pp("model").parameter("norm", &[2], Init::Required).unwrap().equal(&value));
        weights.finish().unwrap();
        assert_eq!(weights.parameters()[0].0, "llm.model.norm");
    }

    #[test]
    fn new_weights_depend_on_seed_and_name_alone() {
        let make = |seed, name: &str| {
            Weights::random(seed, Device::Cpu, Kind::Float).get(name, &[64, 32], Init::KaimingUniform).unwrap()
        };
        assert!(make(1, "a").equal(&make(1, "a")));
        assert!(!make(1, "a").equal(&make(1, "b")));
        assert!(!make(1, "a").equal(&make(2, "a")));
        let bound = 1.0 / 32f64.sqrt();
        let largest = make(3, "a").abs().max().double_value(&[]);
        assert!(largest <= bound && largest > 0.95 * bound, "{largest}");
        let normal = Weights::random(1, Device::Cpu, Kind::Float);
        let std = normal.get("n", &[4096], Init::Normal { std: 0.5 }).unwrap().std(true).double_value(&[]);
        assert!((std - 0.5).abs() < 0.05, "{std}");
    }

    #[test]
    fn parameters_are_f32_leaves_under_their_names() {
        let weights = Weights::random(0, Device::Cpu, Kind::BFloat16);
        let a = weights.pp("layer").pp(3).parameter("lora_A.weight", &[2, 4], Init::KaimingUniform).unwrap();
        let frozen = weights.get("w", &[2], Init::Ones).unwrap();
        assert_eq!((a.kind(), a.requires_grad()), (Kind::Float, true));
        assert_eq!((frozen.kind(), frozen.requires_grad()), (Kind::BFloat16, false));
        let parameters = weights.parameters();
        assert_eq!(parameters.len(), 1);
        assert_eq!(parameters[0].0, "layer.3.lora_A.weight");
        a.sum(Kind::Float).backward();
        assert_eq!(parameters[0].1.grad().sum(Kind::Float).double_value(&[]), 8.0);
    }

    #[test]
    fn a_trained_view_makes_parameters_of_the_same_source() {
        let weights = Weights::random(4, Device::Cpu, Kind::BFloat16);
        let frozen = weights.pp("a").get("weight", &[64, 64], Init::Required).unwrap();
        let trained = weights.trained().pp("a").get("weight", &[64, 64], Init::Required).unwrap();
        assert_eq!((trained.kind(), trained.requires_grad()), (Kind::Float, true));
        assert!(trained.to_kind(Kind::BFloat16).equal(&frozen) && !frozen.requires_grad());
        assert_eq!(weights.trained().kind(), Kind::BFloat16);
        let parameters = weights.parameters(); // the ledger is one for both
        assert!(parameters.len() == 1 && parameters[0].0 == "a.weight");
        let std = |t: &Tensor| t.to_kind(Kind::Float).std(true).double_value(&[]);
        let wide = weights.with_initializer_range(0.5).pp("a").get("weight", &[64, 64], Init::Required).unwrap();
        assert!((std(&frozen) - 0.02).abs() < 2e-3 && (std(&wide) - 0.5).abs() < 0.05);
    }

    #[test]
    fn an_ignored_name_is_no_surprise() {
        let one = ("a.unused".to_owned(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
        let weights = Weights::from_tensors([one], Device::Cpu, Kind::Float);
        assert!(weights.finish().is_err());
        weights.trained().pp("a").ignore("unused");
        weights.finish().unwrap();
        assert!(weights.parameters().is_empty());
    }

    #[test]
    fn what_is_stored_is_handed_out_as_it_lies_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let half = fixtures::Random::new(1).normal([4]).to_kind(Kind::BFloat16);
        let tensors = ["a.x", "a.b.y", "ab.z"].map(|name| (name.to_owned(), half.shallow_clone()));
        save(&path, &tensors, &[]).unwrap();
        let in_file = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
        let in_memory = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
        for weights in [in_file, in_memory] {
            let stored = weights.pp("a").stored().unwrap();
            assert_eq!(stored.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["b.y", "x"]);
            assert!(stored.iter().all(|(_, tensor)| tensor.kind() == Kind::BFloat16 && tensor.equal(&half)));
            assert_eq!(weights.stored().unwrap().len(), 3);
            assert!(weights.finish().unwrap_err().to_string().contains("unexpected a.x"));
        }
        assert!(Weights::random(0, Device::Cpu, Kind::Float).stored().unwrap().is_empty());
    }

    #[test]
    fn a_frozen_weight_of_the_files_kind_is_a_view() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        save(&path, &[("w".into(), fixtures::Random::new(1).normal([8, 8]))], &[]).unwrap();
        let weights = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
        let get = || weights.get("w", &[8, 8], Init::Required).unwrap();
        assert_eq!(get().data_ptr(), get().data_ptr());
        let half =
            Weights::open(&path, Device::Cpu, Kind::BFloat16).unwrap().get("w", &[8, 8], Init::Required).unwrap();
        assert!(max_difference(&half.to_kind(Kind::Float), &get()) < 0.02);
    }

    /// Bytes of the maps of a file that this process shares with others, and of those that it has for itself.
    #[cfg(target_os = "linux")]
    fn mapped(path: &Path) -> (u64, u64) {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut shared, mut own, mut inside) = (0, 0, false);
        for line in smaps.lines() {
            match line.split_once(':').filter(|(key, _)| !key.contains('-') && !key.contains(' ')) {
                None => inside = line.ends_with(path.to_str().unwrap()),
                Some((key, size)) if inside => {
                    let kibibytes = || size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
                    match key {
                        "Shared_Clean" | "Shared_Dirty" => shared += kibibytes() << 10,
                        "Private_Clean" | "Private_Dirty" => own += kibibytes() << 10,
                        _ => {}
                    }
                }
                Some(_) => {}
            }
        }
        (shared, own)
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_forgotten_takes_no_memory_and_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let value = fixtures::Random::new(1).normal([1024, 1024]);
        save(&path, &[("w".into(), value.shallow_clone())], &[]).unwrap();
        let weights = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
        let held = weights.get("w", &[1024, 1024], Init::Required).unwrap();
        assert!(held.equal(&value));
        let resident = || {
            let (shared, own) = mapped(&path);
            shared + own
        };
        let before = resident();
        weights.forget("w");
        let after = resident();
        assert!(before >= 4 << 20 && after < 1 << 20, "{before} {after}");
        assert!(held.equal(&value));
        weights.forget("none of this name");
    }

    /// This test runs itself as a second process.
    #[test]
    #[cfg(target_os = "linux")]
    fn frozen_weights_are_in_memory_once_for_two_processes() {
        use std::io::{BufRead, BufReader, Write};
        use std::process::{Command, Stdio};

        const SECOND: &str = "VORA_TEST_SHARED_WEIGHTS";
        let open = |path: &Path| {
            let weights = Weights::open(path, Device::Cpu, Kind::Float).unwrap();
            let w = weights.get("w", &[2048, 2048], Init::Required).unwrap();
            assert_eq!(w.sum(Kind::Float).double_value(&[]), 0.0); // every page is read
            w
        };
        if let Some(path) = std::env::var_os(SECOND) {
            let _held = open(Path::new(&path));
            std::io::stdout().write_all(b"\nready\n").unwrap();
            std::io::stdin().read_line(&mut String::new()).unwrap();
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let zeros = Tensor::zeros([2048, 2048], (Kind::Float, Device::Cpu));
        save(&path, &[("w".into(), zeros)], &[]).unwrap();
        let _held = open(&path);
        let name = "weights::source::tests::frozen_weights_are_in_memory_once_for_two_processes";
        let mut second = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(SECOND, &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(second.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "ready"), "the second process has not opened the file");
        let (shared, own) = mapped(&path);
        second.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(second.wait().unwrap().success());
        let size = 2048 * 2048 * 4;
        assert!(shared >= size && own <= size / 100, "shared {shared}, own {own} of {size} bytes");
    }
}
