//! A conversion: planned, told, written.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_files::{tell_once, write_folder_atomically};
use vora_gguf::Gguf;
use vora_gguf::write::ModelWriter;
use vora_llm::{CausalLm, LlmConfig};
use vora_lora::{
    ADAPTER_TENSORS, ActsOn, AdapterFolder, BaseModel, LoraConfig, PEFT_PREFIX, merge_state_dict, save_adapter,
};
use vora_torch::checkpoint::Shards;
use vora_torch::checkpoint::{Checkpoint, TensorInfo, save_each};
use vora_torch::weights::Weights;

use super::gguf;
use super::layout::Layout;
use super::mmproj;
use super::options::Options;
use super::plan;
use super::report::{Change, Report, ShardReport, TensorReport};
use super::side_files::{self, SideFile};
use super::source::Source;
use super::step::Step;
use crate::llava::Llava;
use crate::trained::VISION;
use crate::vora::{Vora, VoraConfig};

/// A conversion that is planned, and not yet written.
#[derive(Debug)]
pub struct Conversion {
    source: Source,
    steps: Vec<Step>,
    side_files: Vec<SideFile>,
    to: Layout,
    kind: Option<Kind>,
    output: Output,
}

/// The files of tensors to write.
#[derive(Debug)]
enum Output {
    Shards(Shards),
    /// One GGUF file.
    Gguf(&'static str, Box<ModelWriter>),
    /// An adapter in PEFT's layout, and the vision weights in a file beside it.
    Adapter {
        lora: LoraConfig,
        base: String,
    },
}

impl Conversion {
    /// Plans to make something else of `source`: a folder, a `.safetensors` file, or a GGUF file. `resolve` finds the
    /// folder of an adapter's base model by the name that the adapter knows it by.
    ///
    /// # Errors
    /// Where the source is none, cannot become what is asked for, or has tensors that its layout does not know: all of
    /// them are named.
    pub fn plan(source: &Path, options: &Options, resolve: &dyn Fn(&str) -> Result<PathBuf>) -> Result<Self> {
        let mut source = Source::open(source)?;
        if source.layout == Layout::PeftLlm {
            source.add_base(resolve)?; // which says what it can become
        }
        let asked = options.to.or(source.base_layout);
        let to = source.layout.target(asked).with_context(|| source.path.display().to_string())?;
        // A GGUF file has what an LLM's folder would have, in other words.
        let (of_llm, of_eyes) = (to == Layout::Gguf, to == Layout::Mmproj);
        let (written, to) = if of_llm { (to, Layout::Llm) } else { (to, to) };
        let kind = if of_llm || of_eyes { Some(Kind::Float) } else { options.kind };
        if source.layout == Layout::Peft {
            source.add_base(resolve)?;
        }
        ensure!(
            !options.hf || to == Layout::Vora,
            "--hf is for a VoRA whose adapters are merged, {} becomes {to}",
            source.path.display()
        );
        refuse_other_tokens(&source, to)?;
        let in_source = || format!("converting {} from {} to {written}", source.path.display(), source.layout);
        let mut steps = plan::steps(&source, to, kind).with_context(in_source)?;
        let gguf_kind = || options.gguf_kind.unwrap_or_else(|| gguf::kind_of(side_files::most_stored(&steps)));
        if of_llm {
            let config = side_files::config(&source, to, &steps, None).with_context(in_source)?;
            let config = config.with_context(|| format!("{} has no config.json", source.path.display()))?;
            let writer = gguf::plan(&source, config, &steps, gguf_kind()).with_context(in_source)?;
            return Ok(Self::in_gguf(source, steps, written, gguf::FILE, writer));
        }
        if of_eyes {
            let kind = gguf_kind();
            let writer = mmproj::plan(&source, &mut steps, kind).with_context(in_source)?;
            return Ok(Self::in_gguf(source, steps, written, mmproj::FILE, writer));
        }
        let side_files = side_files::plan(&source, to, &steps, options).with_context(in_source)?;
        let output = if to == Layout::Peft {
            let vora = source.vora.as_ref().context("an adapter comes out of a VoRA")?;
            let lora = vora.lora.clone().context("config.json has no `lora`, which says what the adapters are")?;
            Output::Adapter { lora, base: vora.llm_name.clone() }
        } else {
            Output::Shards(Shards::new(steps.iter().filter_map(Step::info).collect(), options.max_shard_size))
        };
        Ok(Self { source, steps, side_files, to, kind: options.kind, output })
    }

    /// One that writes a single GGUF file, for which every tensor is read in f32.
    fn in_gguf(source: Source, steps: Vec<Step>, to: Layout, file: &'static str, writer: ModelWriter) -> Self {
        let (side_files, kind) = (Vec::new(), Some(Kind::Float));
        Self { source, steps, side_files, to, kind, output: Output::Gguf(file, Box::new(writer)) }
    }

    /// What becomes of every tensor and file.
    pub fn report(&self) -> Report {
        let files = match &self.output {
            Output::Shards(shards) => shards.files().iter().map(ShardReport::of).collect(),
            Output::Gguf(file, writer) => vec![ShardReport::gguf(file, writer)],
            Output::Adapter { .. } => {
                [ADAPTER_TENSORS, VISION].map(|file| ShardReport::new(file, &self.infos_in(file))).into()
            }
        };
        Report {
            source: self.source.path.clone(),
            from: self.source.layout,
            to: self.to,
            tensors: self.steps.iter().map(|step| self.of_step(step)).collect(),
            files,
            side_files: self.side_files.iter().map(SideFile::report).collect(),
        }
    }

    /// What becomes of one tensor: in a GGUF file it has another name, and mostly another dtype.
    fn of_step(&self, step: &Step) -> TensorReport {
        let mut report = step.report();
        if let (Output::Gguf(_, writer), Some(name)) = (&self.output, &step.to) {
            (report.to, report.change) = match writer.name(name) {
                Some(name) => (Some(name.to_owned()), Change::Renamed),
                None => (None, Change::Dropped),
            };
            match writer.kind(name) {
                Some(kind) => report.dtype = kind.to_string(),
                None => report.why = Some("it is tied to the embedding"),
            }
        }
        report
    }

    /// Writes the folder `destination`, which appears whole or not at all, and only if it can be opened.
    ///
    /// # Errors
    /// Where it is there already and not empty, a file cannot be written, a number is beyond the largest of the dtype
    /// asked for, or config and tensors make no model that opens here.
    pub fn write(&self, destination: &Path) -> Result<()> {
        write_folder_atomically(destination, |folder| {
            match &self.output {
                Output::Shards(shards) => shards.write(folder, |name| self.tensor(name))?,
                Output::Gguf(file, writer) => {
                    let path = folder.join(file);
                    let mut out = BufWriter::new(File::create(&path)?);
                    writer.write(&mut out, |name| {
                        let tensor = mmproj::arranged(name, &self.tensor(name)?)?;
                        Ok(Vec::<f32>::try_from(tensor.contiguous().view([-1]))?)
                    })?;
                    out.into_inner()?.sync_all()?;
                }
                Output::Adapter { lora, base } => {
                    let adapter = self.infos_in(ADAPTER_TENSORS).into_iter().map(|info| {
                        let in_base = info.name.strip_prefix(PEFT_PREFIX).unwrap_or(&info.name).to_owned();
                        Ok((in_base, self.tensor(&info.name)?))
                    });
                    save_adapter(folder, lora, BaseModel::causal_lm(base), &adapter.collect::<Result<Vec<_>>>()?)?;
                    save_each(&folder.join(VISION), &self.infos_in(VISION), &[], |name| self.tensor(name))?;
                }
            }
            self.side_files.iter().try_for_each(|file| file.write(folder))?;
            let from = || format!("what comes of {} does not open, and is not kept", self.source.path.display());
            self.open_again(folder).with_context(from)
        })
    }

    /// Opens what was written, its weights as views of the files.
    fn open_again(&self, folder: &Path) -> Result<()> {
        let kind = side_files::most_written(&self.steps).unwrap_or(Kind::Float);
        match self.to {
            Layout::Llm | Layout::FrozenLlm | Layout::Gguf => {
                let weights = Weights::open(folder, Device::Cpu, kind)?;
                CausalLm::load(&LlmConfig::open(folder)?, &weights)?;
                weights.finish()
            }
            Layout::Vora | Layout::VoraUnmerged => Vora::open(folder, Device::Cpu, kind).map(drop),
            Layout::Llava | Layout::LlavaTransformers5 => Llava::open(folder, Device::Cpu, kind).map(drop),
            Layout::Peft => {
                AdapterFolder::open(folder)?;
                VoraConfig::open(folder)?;
                Checkpoint::open(&folder.join(VISION)).map(drop)
            }
            Layout::Mmproj => Gguf::parse(std::fs::read(folder.join(mmproj::FILE))?).map(drop),
            Layout::Safetensors | Layout::PeftLlm | Layout::PeftLlava => Checkpoint::open(folder).map(drop),
        }
    }

    /// The tensors of one of the two files of an adapter.
    fn infos_in(&self, file: &str) -> Vec<TensorInfo> {
        let infos = self.steps.iter().filter_map(Step::info);
        infos.filter(|info| info.name.starts_with(PEFT_PREFIX) == (file == ADAPTER_TENSORS)).collect()
    }

    /// The tensor that is to be written as `name`.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let step = self.steps.iter().find(|step| step.to.as_deref() == Some(name)).context("a planned tensor")?;
        let read = |idx: usize, kind: Option<Kind>| {
            let part = &step.from[idx];
            let checkpoint = &self.source.checkpoints[part.checkpoint];
            match kind {
                Some(kind) => checkpoint.tensor_as(&part.stored, kind),
                None => checkpoint.tensor(&part.stored),
            }
        };
        match step.from.len() {
            0 => return Ok(Tensor::zeros(&step.shape, (step.kind, tch::Device::Cpu))),
            1 => {
                let tensor = step.fitted(read(0, Some(step.kind))?);
                return self.checked(name, tensor, || read(0, None));
            }
            _ => {}
        }
        // Rounded once: where another dtype is to be written, the sum stays in f32 until then.
        let is_other = self.kind.is_some() || step.kind != step.stored_kind;
        let weight = read(0, is_other.then_some(Kind::Float))?;
        let mut parts = vec![(step.from[0].name.clone(), weight)];
        for (idx, part) in step.from.iter().enumerate().skip(1) {
            parts.push((part.name.clone(), read(idx, None)?));
        }
        let lora = self.source.lora.as_ref().context("adapters have a configuration")?;
        let merged = merge_state_dict(parts, lora)?.pop().context("a weight")?.1;
        self.checked(name, merged.to_kind(step.kind), || Ok(merged))
    }

    /// The tensor in its new dtype, if every number in it still is one.
    fn checked(&self, name: &str, tensor: Tensor, before: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        if self.kind == Some(Kind::Half) && tensor.kind() == Kind::Half {
            let infinite = |tensor: &Tensor| tensor.isinf().sum(Kind::Int64).int64_value(&[]);
            let now = infinite(&tensor);
            let new = if now == 0 { 0 } else { now - infinite(&before()?) };
            ensure!(
                new == 0,
                "tensor `{name}`: {new} numbers are beyond the largest of f16, 65504; bf16 has room for them"
            );
        }
        Ok(tensor)
    }
}

/// Adapters that act on some tokens alone: merged they would act on all, which somebody has to ask for; PEFT's layout has
/// no word for it, which is told.
fn refuse_other_tokens(source: &Source, to: Layout) -> Result<()> {
    let answers_on = source.lora.as_ref().map(LoraConfig::answers_on).unwrap_or_default();
    let path = source.path.display();
    if answers_on == ActsOn::All {
        return Ok(());
    }
    ensure!(
        !source.layout.merges_into(to),
        "the adapters of {path} act on `{answers_on}`; merged into the weights they act on every token, which \
         `vora merge {path} --as seeing` is for"
    );
    if to == Layout::Peft {
        tell_once(format!(
            "the adapters of {path} act on `{answers_on}`, for which PEFT has no word: it lets them act on every token"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;

    use serde_json::{Value, json};
    use vora_torch::checkpoint::save;

    use crate::convert::Change;
    use crate::files::save_folder;
    use crate::model::VisionLanguageModel;

    fn to(to: Layout) -> Options {
        Options::default().with_layout(to)
    }

    fn convert(from: &Path, destination: &Path, options: &Options, base: &Path) -> Result<Report> {
        let conversion = Conversion::plan(from, options, &|_| Ok(base.to_owned()))?;
        conversion.write(destination)?;
        Ok(conversion.report())
    }

    /// Kind, shape and bytes of every tensor.
    fn read(path: &Path) -> BTreeMap<String, (Kind, Vec<i64>, Vec<u8>)> {
        let checkpoint = Checkpoint::open(path).unwrap();
        let bytes = |name: &str| {
            let tensor = checkpoint.tensor(name).unwrap();
            let bytes = Vec::<u8>::try_from(tensor.contiguous().view(-1i64).view_dtype(Kind::Uint8)).unwrap();
            (tensor.kind(), tensor.size(), bytes)
        };
        checkpoint.names().map(|name| (name.to_owned(), bytes(name))).collect()
    }

    fn write_json(path: &Path, json: &Value) {
        fs::write(path, json.to_string()).unwrap();
    }

    /// Tensors of several dtypes; some of their bits are no numbers.
    fn folder(path: &Path, config: &Value, names: &[&str]) {
        fs::create_dir(path).unwrap();
        let tensor = |idx: usize| {
            let bits = Tensor::arange(6 + idx as i64, (Kind::Int, Device::Cpu)) * 0x1234_5671 + 0x7fc0_0001;
            bits.view_dtype([Kind::BFloat16, Kind::Float, Kind::Half][idx % 3])
        };
        let tensors: Vec<_> = names.iter().enumerate().map(|(idx, name)| ((*name).to_owned(), tensor(idx))).collect();
        save(&path.join("model.safetensors"), &tensors, &[]).unwrap();
        write_json(&path.join("config.json"), config);
        fs::write(path.join("README.md"), "as it was").unwrap();
    }

    /// A VoRA's folder with adapters whose B is not zero.
    fn unmerged(path: &Path) -> Vora {
        let mut config = VoraConfig::new(LlmConfig::tiny(64), 12, 4, 8);
        config.lora = Some(LoraConfig { lora_alpha: Some(5.0), ..LoraConfig::new(3, 1) });
        config.llm_name = "some/llm".into();
        let weights = Weights::random(5, Device::Cpu, Kind::BFloat16);
        let model = Vora::load(config, &weights).unwrap();
        let random = fixtures::Random::new(5);
        for (name, tensor) in weights.parameters() {
            if name.contains("lora_B") {
                tch::no_grad(|| tensor.shallow_clone().copy_(&random.normal(tensor.size())));
            }
        }
        model.save(path).unwrap();
        let mut tensors: Vec<_> = model.tensors().unwrap();
        tensors.push(("aux_vision.aux_layer_0.0.weight".into(), Tensor::ones([12], (Kind::Float, Device::Cpu))));
        save(&path.join("model.safetensors"), &tensors, &[]).unwrap();
        fs::write(path.join("tokenizer.json"), "{}").unwrap();
        fs::write(path.join("preprocessor_config.json"), "{}").unwrap();
        model
    }

    #[test]
    fn llavas_names_go_there_and_back() {
        let root = tempfile::tempdir().unwrap();
        let [published, modules, back] = ["published", "modules", "back"].map(|name| root.path().join(name));
        let names = [
            "language_model.model.embed_tokens.weight",
            "language_model.model.layers.10.mlp.up_proj.weight",
            "language_model.model.layers.2.mlp.up_proj.weight",
            "language_model.lm_head.weight",
            "vision_tower.vision_model.embeddings.class_embedding",
            "multi_modal_projector.linear_1.bias",
        ];
        let order = root.path().join("order");
        folder(&order, &json!({"model_type": "llava", "text_config": {"dtype": "float32"}}), &names);
        let order = Conversion::plan(&order, &to(Layout::LlavaTransformers5), &|_| unreachable!()).unwrap().report();
        let written: Vec<&str> = order.tensors.iter().filter_map(|tensor| tensor.to.as_deref()).collect();
        let expected = [
            "lm_head.weight",
            "model.language_model.embed_tokens.weight",
            "model.language_model.layers.2.mlp.up_proj.weight",
            "model.language_model.layers.10.mlp.up_proj.weight",
            "model.multi_modal_projector.linear_1.bias",
            "model.vision_tower.vision_model.embeddings.class_embedding",
        ];
        assert_eq!(written, expected);

        let configs = fs::read(fixtures::root().join("golden/llava.json")).unwrap();
        let configs: Value = serde_json::from_slice(&configs).unwrap();
        let tensors = fixtures::open("llava").under("clip.weights.");
        save_folder(&published, &configs["clip"], &tensors).unwrap();
        let report = convert(&published, &modules, &to(Layout::LlavaTransformers5), root.path()).unwrap();
        assert_eq!((report.from, report.to), (Layout::Llava, Layout::LlavaTransformers5));
        assert!(report.tensors.iter().all(|tensor| tensor.change == Change::Renamed));
        let norm = [
            &read(&modules)["model.language_model.norm.weight"],
            &read(&published)["language_model.model.norm.weight"],
        ];
        assert_eq!(norm[0], norm[1]);
        let report = convert(&modules, &back, &to(Layout::Llava), root.path()).unwrap();
        assert_eq!(report.from, Layout::LlavaTransformers5);
        assert_eq!(read(&back), read(&published));
        assert_eq!(fs::read(back.join("config.json")).unwrap(), fs::read(published.join("config.json")).unwrap());

        // Its language model alone, which is the same from either.
        let text_config = configs["clip"]["text_config"].clone();
        for source in [&published, &modules] {
            fs::write(source.join("preprocessor_config.json"), "{}").unwrap();
            fs::write(source.join("tokenizer.json"), "{}").unwrap();
        }
        let [llm, same] = ["llm", "same"].map(|name| root.path().join(name));
        let report = convert(&published, &llm, &to(Layout::Llm), root.path()).unwrap();
        let dropped: Vec<_> = report.tensors.iter().filter(|tensor| tensor.to.is_none()).collect();
        assert!(dropped.len() > 2 && dropped.iter().all(|tensor| tensor.why == Some("it sees")));
        convert(&modules, &same, &to(Layout::Llm), root.path()).unwrap();
        assert_eq!(read(&llm), read(&same));
        assert_eq!(read(&llm).len() + dropped.len(), tensors.len());
        let up_proj = "model.layers.1.mlp.up_proj.weight";
        assert_eq!(read(&llm)[up_proj], read(&published)[&format!("language_model.{up_proj}")]);
        let config = LlmConfig::open(&llm).unwrap();
        assert_eq!(config.hidden_size, text_config["hidden_size"]);
        assert_eq!(config.extra["architectures"], json!(["LlamaForCausalLM"]));
        assert!(llm.join("tokenizer.json").exists() && !llm.join("preprocessor_config.json").exists());
        let with_adapters = root.path().join("with-adapters");
        folder(
            &with_adapters,
            &json!({"model_type": "llava", "text_config": text_config}),
            &["language_model.lm_head.weight", "language_model.model.layers.0.mlp.up_proj.lora_A.weight"],
        );
        let error = convert(&with_adapters, &root.path().join("x"), &to(Layout::Llm), root.path());
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("has adapters beside its weights; `vora merge` folds them in"), "{error}");

        let stranger = root.path().join("stranger");
        folder(&stranger, &json!({"model_type": "llava"}), &["language_model.model.a", "image_newline", "other"]);
        let error = convert(&stranger, &root.path().join("x"), &to(Layout::LlavaTransformers5), root.path());
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.ends_with("no part of llava is named\n  image_newline\n  other"), "{error}");
    }

    #[test]
    fn shards_go_there_and_back() {
        let root = tempfile::tempdir().unwrap();
        let [one, many, back] = ["one", "many", "back"].map(|name| root.path().join(name));
        folder(&one, &json!({"model_type": "new", "torch_dtype": "float32"}), &["a.0", "a.1", "a.10", "a.2", "b"]);
        let report = convert(&one, &many, &Options::default().with_max_shard_size(70), root.path()).unwrap();
        let files: Vec<_> = report.files.iter().map(|shard| (shard.file.as_str(), shard.tensors)).collect();
        assert_eq!(
            files,
            [
                ("model-00001-of-00003.safetensors", 2),
                ("model-00002-of-00003.safetensors", 2),
                ("model-00003-of-00003.safetensors", 1)
            ]
        );
        assert_eq!(read(&many), read(&one));
        convert(&many, &back, &Options::default(), root.path()).unwrap();
        let names = |path: &Path| -> Vec<_> {
            let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&back), names(&one));
        for name in names(&one) {
            assert_eq!(fs::read(back.join(&name)).unwrap(), fs::read(one.join(&name)).unwrap(), "{name:?}");
        }
        // A single file has no config, and is one all the same.
        convert(&one.join("model.safetensors"), &root.path().join("file"), &Options::default(), root.path()).unwrap();
        assert_eq!(names(&root.path().join("file")), ["model.safetensors"]);
    }

    #[test]
    fn an_unmerged_vora_is_an_adapter_and_its_llm() {
        let root = tempfile::tempdir().unwrap();
        let [whole, adapter, llm, back] = ["whole", "adapter", "llm", "back"].map(|name| root.path().join(name));
        unmerged(&whole);
        let report = convert(&whole, &adapter, &to(Layout::Peft), root.path()).unwrap();
        assert_eq!(report.from, Layout::VoraUnmerged);
        assert!(report.tensors.iter().any(|tensor| tensor.change == Change::Dropped));
        let folder = AdapterFolder::open(&adapter).unwrap();
        assert_eq!((folder.base_model(), folder.config().scaling()), (Some("some/llm"), 5.0 / 3.0));
        assert!(adapter.join("tokenizer.json").exists() && adapter.join("vision.safetensors").exists());

        convert(&whole, &llm, &to(Layout::FrozenLlm), root.path()).unwrap();
        assert!(!llm.join("preprocessor_config.json").exists());
        let config = LlmConfig::open(&llm).unwrap();
        assert_eq!((config.model_type.as_str(), config.dtype.as_deref()), ("llama", Some("bfloat16")));
        assert_eq!(config.extra["architectures"], json!(["LlamaForCausalLM"]));
        let weights = Weights::open(&llm, Device::Cpu, Kind::BFloat16).unwrap();
        CausalLm::load(&config, &weights).unwrap();
        weights.finish().unwrap();

        let report = convert(&adapter, &back, &to(Layout::VoraUnmerged), &llm).unwrap();
        assert_eq!(report.from, Layout::Peft);
        // All but what the published code has otherwise: adapters are scaled, and each of their linears has a bias.
        let (mut back_tensors, mut tensors) = (read(&back), read(&whole));
        for tensors in [&mut back_tensors, &mut tensors] {
            let is_bias = |name: &str| name.contains("_proj") && name.ends_with(".bias");
            tensors.retain(|name, _| !name.contains("lora_B") && !is_bias(name));
        }
        assert_eq!(back_tensors, tensors);
        let b = |folder: &Path| {
            Checkpoint::open(folder).unwrap().tensor("llm.model.layers.0.mlp.up_proj.lora_B.weight").unwrap()
        };
        fixtures::assert_close_to(&b(&back), &(b(&whole) * (5.0 / 3.0)), 1e-6);
        let opened = Vora::open(&back, Device::Cpu, Kind::BFloat16).unwrap();
        assert_eq!(opened.config().lora, Some(LoraConfig::new(3, 1)));
        assert!(opened.config().biases.is_some());
    }

    #[test]
    fn adapters_are_merged_as_the_model_merges_them() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let mut model = unmerged(&at("whole"));
        let report = convert(&at("whole"), &at("merged"), &to(Layout::Vora), root.path()).unwrap();
        let made = report.tensors.iter().filter(|tensor| tensor.change == Change::Made);
        assert!(made.clone().all(|tensor| tensor.from.len() == 3));
        assert_eq!(made.count(), 7);
        model.merge().unwrap();
        model.save(&at("expected")).unwrap();
        let (mut merged, expected) = (read(&at("merged")), read(&at("expected")));
        assert!(merged.remove("aux_vision.aux_layer_0.0.weight").is_some());
        assert_eq!(merged, expected);
        assert_eq!(Vora::open(&at("merged"), Device::Cpu, Kind::BFloat16).unwrap().config().lora, None);

        // By way of the adapter it is the same model.
        convert(&at("whole"), &at("adapter"), &to(Layout::Peft), root.path()).unwrap();
        convert(&at("whole"), &at("frozen"), &to(Layout::FrozenLlm), root.path()).unwrap();
        convert(&at("adapter"), &at("again"), &to(Layout::Vora), &at("frozen")).unwrap();
        assert_eq!(read(&at("again")), read(&at("merged")));
        let only_adapter = at("adapter-alone");
        fs::create_dir(&only_adapter).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(at("adapter").join(name), only_adapter.join(name)).unwrap();
        }
        let report = convert(&only_adapter, &at("plain"), &Options::default(), &at("frozen")).unwrap();
        assert_eq!((report.from, report.to), (Layout::PeftLlm, Layout::Llm));
        convert(&at("merged"), &at("llm"), &to(Layout::Llm), root.path()).unwrap();
        assert_eq!(read(&at("plain")), read(&at("llm")));
        assert_eq!(LlmConfig::open(&at("plain")).unwrap(), LlmConfig::open(&at("frozen")).unwrap());

        // In another dtype, the sum is rounded once.
        let f32s = to(Layout::Vora).with_kind(Kind::Float);
        convert(&at("whole"), &at("f32"), &f32s, root.path()).unwrap();
        let (whole, f32s) = (Checkpoint::open(&at("whole")).unwrap(), Checkpoint::open(&at("f32")).unwrap());
        let module = "llm.model.layers.0.mlp.up_proj";
        let part = |name: &str| whole.tensor(&format!("{module}.{name}.weight")).unwrap();
        let weight = whole.tensor(&format!("{module}.weight")).unwrap().to_kind(Kind::Float);
        let expected = weight + part("lora_B").matmul(&part("lora_A")) * (5.0 / 3.0);
        fixtures::assert_close_to(&f32s.tensor(&format!("{module}.weight")).unwrap(), &expected, 1e-6);
    }

    /// An adapter's folder for the LLM in `base`, with these whole tensors beside the adapters.
    fn adapter_with(path: &Path, base: &Path, whole: &[(&str, Tensor)]) {
        let (random, lora) = (fixtures::Random::new(8), LoraConfig::new(3, 1));
        let base = Checkpoint::open(base).unwrap();
        let mut tensors = Vec::new();
        for module in base.names().filter_map(|name| name.strip_suffix("_proj.weight")) {
            if let [out, width] = base.info(&format!("{module}_proj.weight")).unwrap().1[..]
                && module.starts_with("model.layers.0.")
            {
                tensors.push((format!("{module}_proj.lora_A.weight"), random.normal([3, width])));
                tensors.push((format!("{module}_proj.lora_B.weight"), random.normal([out, 3])));
            }
        }
        tensors.extend(whole.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone())));
        fs::create_dir(path).unwrap();
        save_adapter(path, &lora, BaseModel::causal_lm("some/base"), &tensors).unwrap();
    }

    #[test]
    fn an_adapters_whole_tensors_fit_its_base_or_are_named() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let base = CausalLm::load(&LlmConfig::tiny(64), &Weights::random(5, Device::Cpu, Kind::Float)).unwrap();
        save_folder(&at("base"), &serde_json::to_value(base.config()).unwrap(), &base.tensors()).unwrap();
        let random = fixtures::Random::new(9);
        let (embedding, head) = (random.normal([66, 32]), random.normal([66, 32]));

        let strays = [("model.layers.7.mlp.norm.weight", head.copy()), ("visual.proj.weight", head.copy())];
        adapter_with(&at("stray"), &at("base"), &strays);
        let error = format!("{:#}", convert(&at("stray"), &at("out"), &Options::default(), &at("base")).unwrap_err());
        let named =
            "another model?\n  base_model.model.model.layers.7.mlp.norm.weight\n  base_model.model.visual.proj.weight";
        assert!(error.contains("fit nothing in its base") && error.ends_with(named), "{error}");
        assert!(!at("out").exists());

        // A larger vocabulary, and a head apart from the embedding although the base ties them.
        let whole = [("model.embed_tokens.weight", embedding.copy()), ("lm_head.weight", head.copy())];
        adapter_with(&at("both"), &at("base"), &whole);
        convert(&at("both"), &at("merged"), &Options::default(), &at("base")).unwrap();
        let config = LlmConfig::open(&at("merged")).unwrap();
        assert_eq!((config.vocab_size, config.tie_word_embeddings), (66, false));
        let weights = Weights::open(&at("merged"), Device::Cpu, Kind::Float).unwrap();
        let llm = CausalLm::load(&config, &weights).unwrap();
        weights.finish().unwrap();
        let hidden = random.normal([2, 32]);
        assert!(llm.logits(&hidden).equal(&hidden.matmul(&head.tr())));

        // The embedding alone: the head is tied to it still.
        adapter_with(&at("embedding"), &at("base"), &whole[..1]);
        convert(&at("embedding"), &at("tied"), &Options::default(), &at("base")).unwrap();
        let config = LlmConfig::open(&at("tied")).unwrap();
        assert_eq!((config.vocab_size, config.tie_word_embeddings), (66, true));
    }

    #[test]
    fn a_gguf_file_becomes_a_folder() {
        let root = tempfile::tempdir().unwrap();
        let file = fixtures::root().join("golden/gguf_file.gguf");
        let out = root.path().join("llm");
        let report = convert(&file, &out, &Options::default().with_kind(Kind::BFloat16), root.path()).unwrap();
        assert_eq!((report.from, report.to), (Layout::Gguf, Layout::Llm));
        let written = Checkpoint::open(&out).unwrap();
        let expected = fixtures::open("gguf_file").under("hf.");
        assert_eq!(written.names().count(), expected.len());
        for (name, expected) in expected {
            assert!(written.tensor(&name).unwrap().equal(&expected), "{name}");
        }
        let config = LlmConfig::open(&out).unwrap();
        assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
        assert!(out.join("tokenizer.json").exists() && out.join("tokenizer_config.json").exists());
    }

    #[test]
    fn kinds_change_where_numbers_fit() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        folder(&at("a"), &json!({"torch_dtype": "float32", "vision_config": {"dtype": "bfloat16"}}), &[]);
        let write = |large: f32| {
            let tensors = [
                ("w".to_owned(), Tensor::from_slice(&[1.5f32, large])),
                ("ids".to_owned(), Tensor::from_slice(&[3i64])),
            ];
            save(&at("a").join("model.safetensors"), &tensors, &[]).unwrap();
        };
        let half = Options::default().with_kind(Kind::Half);
        write(70_000.0);
        let error = format!("{:#}", convert(&at("a"), &at("b"), &half, root.path()).unwrap_err());
        assert!(error.contains("tensor `w`: 1 numbers are beyond the largest of f16"), "{error}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing is left");
        for fits in [-60_000.0, f32::INFINITY] {
            write(fits);
            let _ = fs::remove_dir_all(at("b"));
            convert(&at("a"), &at("b"), &half, root.path()).unwrap();
            let kinds: Vec<_> = read(&at("b")).into_values().map(|(kind, _, _)| kind).collect();
            assert_eq!(kinds, [Kind::Int64, Kind::Half]);
        }
        let config: Value = serde_json::from_slice(&fs::read(at("b").join("config.json")).unwrap()).unwrap();
        assert_eq!(config, json!({"torch_dtype": "float16", "vision_config": {"dtype": "float16"}}));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        unmerged(&at("whole"));
        let error = |from: &str, to: &str, options: &Options| {
            format!("{:#}", convert(&at(from), &at(to), options, &at("nowhere")).unwrap_err())
        };
        let said = error("whole", "x", &to(Layout::Llm));
        assert!(
            said.ends_with("vora-unmerged cannot become llm, only vora-unmerged or vora or peft or frozen-llm"),
            "{said}"
        );
        convert(&at("whole"), &at("adapter"), &to(Layout::Peft), root.path()).unwrap();
        let said = error("adapter", "x", &Options::default());
        assert!(said.ends_with("peft can become vora-unmerged or vora: say which"), "{said}");
        let said = error("adapter", "x", &to(Layout::Vora));
        assert!(said.contains("the model below the adapter") && said.contains("nowhere"), "{said}");
        assert!(error("whole", "adapter", &Options::default()).contains("adapter is not empty: choose another folder"));
        assert!("ggml".parse::<Layout>().unwrap_err().to_string().contains("known are gguf, llm, frozen-llm, vora"));

        let mut tensors: Vec<_> = Checkpoint::open(&at("whole"))
            .map(|c| c.names().map(|name| (name.to_owned(), c.tensor(name).unwrap().copy())).collect())
            .unwrap();
        tensors.retain(|(name, _)| !name.ends_with("layers.0.mlp.up_proj.lora_B.weight"));
        let path = "llm.model.layers.0.mlp.gate_proj.lora_A.weight";
        let place = tensors.iter().position(|(name, _)| name == path).unwrap();
        tensors[place].1 = tensors[place].1.narrow(0, 0, 2).copy();
        tensors.push(("stray.weight".into(), Tensor::from(1f32)));
        save(&at("whole").join("model.safetensors"), &tensors, &[]).unwrap();
        let said = error("whole", "x", &to(Layout::Vora));
        assert!(said.contains("adapters that fit no weight:\n  llm.model.layers.0.mlp.gate_proj: weight [64, 32], A [2, 32] and B [64, 3] of rank 3 do not fit\n  llm.model.layers.0.mlp.up_proj lacks lora_B.weight"), "{said}");
        let said = error("whole", "x", &to(Layout::FrozenLlm));
        assert!(said.ends_with("no part of vora-unmerged is named\n  stray.weight"), "{said}");
        assert!(!at("x").exists());
    }
}
