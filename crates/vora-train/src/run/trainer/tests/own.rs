//! Runs on data, teachers and models of a program's own.

use serde_json::{Value, json};
use vora_data::{Record, RgbImage, Sample, Source};
use vora_image::{IMAGENET_DEFAULT, Resample};
use vora_llm::{CausalLm, LlmConfig, VisionAttention};
use vora_lora::LoraConfig;
use vora_model::AdaptedLlm;
use vora_recipe::{DataConfig, ModelConfig, ModelType, TrainData};
use vora_text::{Message, Part};
use vora_torch::weights::{Init, Weights};

use super::*;
use crate::data::{HeldOut, Sources};
use vora_student::Pictures;
use vora_student::{Student, StudentParts, Teacher};

/// Three grey pictures and what they are called.
struct Greys {
    maker: Arc<SampleMaker>,
    darker: u8, // than those of another process
    seen: AtomicBool,
    forgets: bool, // that it must give the same sample again
}

impl Source for Greys {
    fn len(&self) -> Option<u64> {
        Some(3)
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let again = self.seen.swap(true, Ordering::Relaxed) && self.forgets;
        let grey = 60 * (index as u8 + 1) - self.darker - u8::from(again);
        let picture = RgbImage::from_pixel(56, 56, [grey; 3].into());
        let question = Message::of_parts("user", vec![Part::Image, Part::Text("How bright?".to_owned())]);
        let answer = Message::new("assistant", ["dark", "grey", "bright"][index as usize]);
        let record = Record {
            id: format!("grey {index}"),
            frames: vec![String::new()],
            messages: vec![question, answer],
            rejected: None,
            notes: Vec::new(),
        };
        self.maker.conversation(&record, &[picture])
    }
}

fn greys(config: &TrainConfig, darker: u8) -> Sources {
    let maker = Arc::new(SampleMaker::new(vora_student::preparation(config, &resolve).unwrap()));
    sources(maker, darker, false)
}

fn sources(maker: Arc<SampleMaker>, darker: u8, forgets: bool) -> Sources {
    let source = Arc::new(Greys { maker, darker, seen: AtomicBool::new(false), forgets });
    Sources::own("greys", source.clone()).with_held_out(HeldOut::new("same", source, 10))
}

fn options(resume: bool) -> Options<'static> {
    Options { resume, ..Options::new(Device::Cpu, &resolve) }
}

fn error(found: Result<Trainer>) -> String {
    format!("{:#}", found.err().expect("it is refused"))
}

#[test]
fn a_source_of_ones_own_trains_is_asked_and_goes_on_bit_for_bit() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // The file's scenes give way; two passes over three samples are three steps of two.
    let set = ["num_train_epochs=2", "gradient_accumulation_steps=1", "distill.mean_over=2", "save_steps=100"];
    let with = |folder: &Path| TrainConfig { max_steps: -1, ..config("smoke.yaml", folder, &set) };
    let open = |folder: &Path, resume, darker| {
        let config = with(folder);
        let own = greys(&config, darker);
        Trainer::with_data(config, options(resume), own)
    };
    let mut uninterrupted = open(whole.path(), false, 0).unwrap();
    let Outcome::Finished(report) = uninterrupted.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
    assert_eq!(report.0.keys().collect::<Vec<_>>(), ["same"]);
    assert_eq!((uninterrupted.step(), report.0["same"]["turn"].n), (3, 3));
    let mut first = open(parts.path(), false, 0).unwrap();
    let stop = first.stop.clone();
    assert_eq!(first.train(&mut StopAfter(2, stop)).unwrap(), Outcome::Stopped { step: 2 });
    drop(first);
    let refused = error(open(parts.path(), true, 1));
    assert!(refused.contains("cannot resume: the source `greys` gives other first samples"), "{refused}");
    let mut second = open(parts.path(), true, 0).unwrap();
    assert_eq!(second.step(), 2);
    second.train(&mut Silent).unwrap();
    assert_same(&weights(&uninterrupted), &weights(&second));
    assert_eq!(losses(whole.path()), losses(parts.path()));
    drop(second);
    // The run folder says whose data it was, and `vora` refuses to go on with what it does not have.
    let written = std::fs::read_to_string(parts.path().join("config.yaml")).unwrap();
    let written = TrainConfig::parse(&written, &[]).unwrap();
    assert_eq!(written.data.train.source.as_deref(), Some("greys"));
    let refused = error(Trainer::new(written, options(true)));
    assert!(refused.contains("data.train.source is `greys`: a program of its own"), "{refused}");
}

#[test]
fn a_source_that_no_run_can_go_on_with_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refuse = |forgets: bool, set: &[&str]| {
        let config = config("smoke.yaml", folder.path(), set);
        let maker = Arc::new(SampleMaker::new(vora_student::preparation(&config, &resolve).unwrap()));
        error(Trainer::with_data(config, options(false), sources(maker, 0, forgets)))
    };
    let two = refuse(true, &[]);
    assert!(two.contains("the source `greys` gives two samples for the number 0"), "{two}");
    let pairs = refuse(false, &["loss=dpo"]);
    assert!(pairs.contains("sample grey 0 of the source `greys` has no rejected answer"), "{pairs}");
}

/// Means of squares of 28 pixels, projected: four features of a picture of 56, in as many blocks as asked for.
#[derive(Debug)]
struct Means {
    proj: Tensor, // [hidden, 3]
    says: i64,    // its hidden size
}

impl Means {
    fn new() -> Self {
        Self { proj: fixtures::Random::new(3).normal([6, 3]), says: 6 }
    }
}

impl Teacher for Means {
    fn num_hidden_layers(&self) -> usize {
        2
    }

    fn hidden_size(&self) -> i64 {
        self.says
    }

    fn grid(&self, height: i64, width: i64) -> (i64, i64) {
        (height / 28, width / 28)
    }

    fn patch_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor> {
        let means = pixel_values.avg_pool2d([28, 28], [28, 28], [0, 0], false, true, None); // [n, 3, rows, columns]
        let rows = means.flatten(2, 3).transpose(1, 2).linear::<&Tensor>(&self.proj, None); // [n, patches, hidden]
        (0..=num_layers).map(|layer| &rows + layer as f64).collect()
    }
}

#[test]
fn a_teacher_of_ones_own_teaches_and_is_brought_again() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let set = ["model.aux_vision=null", "bf16=false", "max_steps=3", "data.eval={}"];
    let with = |folder: &Path, more: &[&str]| config("smoke.yaml", folder, &[&set[..], more].concat());
    let student = |config: &TrainConfig, teacher: Means| {
        Student::new(config, Device::Cpu, Kind::Float, &resolve)?.with_teacher(Box::new(teacher), config)
    };
    let open = |folder: &Path, resume| {
        let config = with(folder, &[]);
        let student = student(&config, Means::new())?;
        let maker = Arc::new(SampleMaker::new(student.preparation(&config)?));
        let sources = Sources::open(&config, &maker)?;
        Trainer::from_parts(config, options(resume), student, sources)
    };
    let mut trainer = open(whole.path(), false).unwrap();
    let metrics = trainer.train_step().unwrap();
    assert_eq!(metrics.distill_blocks.len(), 2);
    assert!(metrics.loss_distill.is_some_and(f64::is_finite) && metrics.baseline_distill.is_some());
    let head = named(&trainer, |name| name == "aux_vision.aux_layer_1.1.weight");
    assert_eq!(head[0].1.size(), [6, 32]);
    let rest = |trainer: &mut Trainer| (1..3).for_each(|_| drop(trainer.train_step().unwrap()));
    rest(&mut trainer);

    let mut first = open(parts.path(), false).unwrap();
    first.train_step().unwrap();
    first.save(&mut Silent).unwrap();
    drop(first);
    // Without the teacher it is another model.
    let refused = error(try_new(with(parts.path(), &[]), true));
    assert!(refused.contains("it has heads of a teacher, and this run has none"), "{refused}");
    let mut second = open(parts.path(), true).unwrap();
    rest(&mut second);
    assert_same(&weights(&trainer), &weights(&second));
    drop(second);

    let untaught = with(parts.path(), &[]);
    let refused = |found: Result<Student>| found.unwrap_err().to_string();
    let wrong = refused(student(&untaught, Means { says: 7, ..Means::new() }));
    assert!(wrong.contains("the teacher's hidden state 1 of a picture of 56 x 56 pixels is [1, 4, 6]"), "{wrong}");
    let cached = with(parts.path(), &["distill.cache=somewhere"]);
    assert!(refused(student(&cached, Means::new())).contains("distill.cache knows a teacher by the files"));
    let taught = config("smoke.yaml", parts.path(), &[]);
    assert!(refused(student(&taught, Means::new())).contains("there is a teacher already"));
    let none = with(parts.path(), &["distill.center=true", "overwrite_output_dir=true"]);
    let none = error(try_new(none, false));
    assert!(none.contains("distill.center is true, but model.aux_vision names no teacher"), "{none}");
}

/// A model in which a patch is the mean of its pixels, made as wide as the LLM.
#[derive(Debug)]
struct MeanPatches {
    llm: AdaptedLlm,
    proj: Tensor, // [hidden, 3]
}

impl VisionLanguageModel for MeanPatches {
    fn adapted(&self) -> &AdaptedLlm {
        &self.llm
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        &mut self.llm
    }

    fn vision_attention(&self) -> VisionAttention {
        VisionAttention::Bidirectional
    }

    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        Ok((height / 14, width / 14))
    }

    fn image_features(&self, pixel_values: &Tensor) -> Tensor {
        let means = pixel_values.avg_pool2d([14, 14], [14, 14], [0, 0], false, true, None);
        let rows = means.flatten(2, 3).transpose(1, 2); // [n, patches, 3]
        rows.linear::<&Tensor>(&self.proj, None).to_kind(self.llm().kind())
    }

    fn llm_prefix(&self) -> &'static str {
        "llm."
    }

    fn config_json(&self) -> Result<Value> {
        Ok(json!({"model_type": "mean_patches"}))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![("stem.proj".to_owned(), self.proj.shallow_clone())])
    }
}

/// A run made in code: no file is read but the LLM's.
fn mean_patches(folder: &Path, resume: bool) -> Result<Trainer> {
    let lora = LoraConfig::new(4, 2);
    let config = TrainConfig {
        output_dir: folder.to_owned(),
        max_steps: 4,
        learning_rate: 1e-2,
        bf16: Some(false),
        model: ModelConfig {
            model_type: ModelType::Own,
            llm: "fixtures/tiny/llm".to_owned(),
            image_size: 56,
            lora: Some(lora.clone()),
            ..ModelConfig::default()
        },
        data: DataConfig { train: TrainData::default(), ..DataConfig::default() },
        ..TrainConfig::default()
    };
    let llm_folder = resolve(&config.model.llm)?;
    let weights = Weights::open(&llm_folder, Device::Cpu, Kind::Float)?;
    let llm_config = LlmConfig::open(&llm_folder)?;
    let mut llm = AdaptedLlm::new(CausalLm::load(&llm_config, &weights)?);
    weights.finish()?;
    let trained = Weights::random(config.seed, Device::Cpu, Kind::Float);
    llm.attach("default", &lora, &trained.pp("llm"))?;
    let proj = trained.pp("stem").parameter("proj", &[llm_config.hidden_size, 3], Init::Normal { std: 0.02 })?;
    let (mean, std) = IMAGENET_DEFAULT;
    let pictures = Pictures::new(ImageProcessor::square(56, mean, std, Resample::Bicubic), 14);
    let model = Box::new(MeanPatches { llm, proj });
    let student = Student::from_parts(StudentParts { model, trained, llm: None, llm_folder, pictures }, &config)?;
    let maker = Arc::new(SampleMaker::new(student.preparation(&config)?));
    Trainer::from_parts(config, options(resume), student, sources(maker, 0, false))
}

#[test]
fn a_model_of_ones_own_learns_is_saved_and_goes_on_bit_for_bit() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut trainer = mean_patches(whole.path(), false).unwrap();
    trainer.train(&mut Silent).unwrap();
    let of_steps = losses(whole.path());
    assert!(of_steps[3].1 < of_steps[0].1, "{of_steps:?}");
    let last = whole.path().join("final");
    assert!(last.join("adapter_model.safetensors").exists() && last.join("tokenizer.json").exists());
    let vision = Checkpoint::open(&last.join("vision.safetensors")).unwrap();
    assert_eq!(vision.names().collect::<Vec<_>>(), ["stem.proj"]);

    let mut first = mean_patches(parts.path(), false).unwrap();
    first.train_step().unwrap();
    first.save(&mut Silent).unwrap();
    drop(first);
    let mut second = mean_patches(parts.path(), true).unwrap();
    assert_eq!(second.step(), 1);
    (1..4).for_each(|_| drop(second.train_step().unwrap()));
    assert_same(&weights(&trainer), &weights(&second));
    assert_eq!(of_steps, losses(parts.path()));
    drop(second);
    // The program `vora` knows no such model.
    let text = std::fs::read_to_string(parts.path().join("config.yaml")).unwrap();
    let refused = error(try_new(TrainConfig::parse(&text, &[]).unwrap(), true));
    assert!(refused.contains("model.type is `own`"), "{refused}");
}
