//! Training, showing and asking see the same pixels.

use vora_image::{Aspect, Pixels, RgbImage};
use vora_student::{Student, preparation};

use super::*;
use crate::run::snapshot::Snapshot;

fn opened(overrides: &[&str]) -> TrainConfig {
    let overrides: Vec<String> = overrides.iter().map(|&entry| entry.to_owned()).collect();
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/smoke.yaml");
    TrainConfig::open(&recipe, &overrides).unwrap()
}

const WAYS: [&str; 3] = [
    "seed=0",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2}",
    "model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, vqmodel: {num_embeddings: 32}}",
];

/// A picture with a frame, so that what is cut off or squeezed shows.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let is_edge = x < 4 || y < 4 || x + 4 >= width || y + 4 >= height;
        if is_edge { [255, 0, 0].into() } else { [(x % 256) as u8, (y % 256) as u8, 90].into() }
    })
}

#[test]
fn training_showing_and_asking_see_the_same_pixels() {
    let pictures = [picture(150, 60), picture(60, 150), picture(56, 56)];
    let see = |processor: &ImageProcessor| pictures.clone().map(|picture| processor.preprocess(&picture).unwrap());
    let mut seen: Vec<(Option<&str>, [Pixels; 3])> = Vec::new();
    for way in WAYS {
        for aspect in [None, Some("pad"), Some("squash"), Some("crop")] {
            let key = aspect.map(|aspect| format!("model.image_aspect_ratio={aspect}"));
            let config = opened(&[&[way], key.as_deref().as_slice()].concat());
            let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap();
            let trained = see(&student.pictures().processor); // what evaluations during the run see too
            assert_eq!(see(&preparation(&config, &resolve).unwrap().processor), trained);
            let (run, merged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            Snapshot::of(&student).unwrap().write(run.path()).unwrap();
            vora_model::beside::copy_beside(run.path(), merged.path()).unwrap();
            for folder in [run.path(), merged.path()] {
                assert_eq!(see(&ImageProcessor::open(folder).unwrap()), trained, "{way} {aspect:?}");
            }
            if way == WAYS[0] {
                seen.push((aspect, trained));
            }
        }
    }
    // A new run pads; wide and tall pictures are another thing each way, and a square one never is.
    assert_eq!(seen[0].1, seen[1].1);
    for (a, b) in [(1, 2), (1, 3), (2, 3)] {
        let differ = |idx: usize| seen[a].1[idx] != seen[b].1[idx];
        assert_eq!([0, 1, 2].map(differ), [true, true, false], "{:?} {:?}", seen[a].0, seen[b].0);
    }
}

#[test]
fn what_is_gone_on_from_keeps_its_pictures() {
    let run = tempfile::tempdir().unwrap();
    let cropped = opened(&["model.image_aspect_ratio=crop"]);
    let student = Student::new(&cropped, Device::Cpu, Kind::Float, &resolve).unwrap();
    Snapshot::of(&student).unwrap().write(run.path()).unwrap();
    let from = format!("model.pretrained={}", run.path().display());
    let aspect = |more: &[&str]| {
        let config = opened(&[&[from.as_str()], more].concat());
        let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap();
        let shown = preparation(&config, &resolve).unwrap().processor;
        assert_eq!(shown.to_json(), student.pictures().processor.to_json());
        student.pictures().processor.aspect()
    };
    assert_eq!(aspect(&[]), Aspect::Crop);
    assert_eq!(aspect(&["model.aux_vision=null", "distill.center=false"]), Aspect::Crop);
    assert_eq!(aspect(&["model.image_aspect_ratio=squash"]), Aspect::Squash);
    assert_eq!(aspect(&["model.background_color=[1, 2, 3]"]), Aspect::Pad([1, 2, 3]));
}

#[test]
fn a_published_recipe_says_how_pictures_are_prepared() {
    let aspect = |ops: &str| {
        let config = opened(&[&format!("data.train.data_preprocess={{frames_ops: {ops}}}")]);
        let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap();
        student.pictures().processor.aspect()
    };
    let transform = "HFImageTransform: {path: fixtures/tiny/dinov2}";
    assert_eq!(aspect(&format!("{{PILExpand2Square: {{}}, {transform}}}")), Aspect::Pad([0; 3]));
    assert_eq!(aspect(&format!("{{{transform}}}")), Aspect::Squash); // the teacher's own way
    let config = opened(&["data.train.data_preprocess={frames_ops: fixtures/nowhere}"]);
    let error = format!("{:#}", preparation(&config, &resolve).unwrap_err());
    assert!(error.contains("data_preprocess.frames_ops: no preprocessor_config.json in"), "{error}");
}
