//! Gemma 4 Unified's eyes on another LLM: a VoRA whose pictures go through its embedder.

use anyhow::Result;
use tch::{Device, Kind};
use vora_image::RgbImage;
use vora_model::{VisionEmbedding, VisionEmbeddingType, Vora};
use vora_student::Student;

use crate::taught::{self, asked, resolve};

const EYES: [&str; 3] =
    ["model.vision_embedding=gemma4_unified", "model.reuse_aux_vision_embedding_layers=", "bf16=false"];

#[test]
fn a_run_goes_on_bit_for_bit_and_what_it_leaves_opens_and_merges() {
    let alone = ["model.aux_vision=", "distill={}"];
    let shaped = [
        "model.min_image_tokens=4",
        "model.max_image_tokens=16",
        "data.train.scenes={aspects: [0.333, 3], sides: [14, 84]}",
    ];
    for more in [&alone[..], &shaped] {
        let more = [&EYES[..], more].concat();
        let [whole, parts] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        let run = |folder, stops| taught::parameters("smoke.yaml", folder, &more, stops);
        let (uninterrupted, resumed) = (run(whole.path(), false), run(parts.path(), true));
        assert_eq!(uninterrupted.len(), resumed.len());
        for ((name, a), (_, b)) in uninterrupted.iter().zip(&resumed) {
            assert!(a.equal(b), "{more:?}: {name}");
        }
        let table = uninterrupted.iter().find(|(name, _)| name == "vision_embedding.vision_embedder.pos_embedding");
        assert_eq!(table.unwrap().1.size(), [1120, 2, 32]); // as wide as the LLM

        let picture = RgbImage::from_fn(60, 30, |x, y| [(x * 4) as u8, (y * 8) as u8, 99].into());
        let left = whole.path().join("run/final");
        let mut model = vora_model::open(&left, Device::Cpu, Kind::Float, &resolve).unwrap();
        let logits = asked(&*model, &left, &picture);
        model.merge().unwrap();
        let merged = whole.path().join("merged");
        model.save(&merged).unwrap();
        vora_model::beside::copy_beside(&left, &merged).unwrap();
        let again = Vora::open(&merged, Device::Cpu, Kind::Float).unwrap();
        assert!(matches!(again.vision_embedding(), VisionEmbedding::Gemma4Unified(_)));
        fixtures::assert_close_to(&asked(&again, &merged, &picture), &logits, 1e-4);
        let config = again.config();
        assert_eq!(config.vision_embedding, VisionEmbeddingType::Gemma4Unified);
        // It sees: another picture is another answer.
        assert!((asked(&again, &merged, &RgbImage::new(60, 30)) - logits).abs().max().double_value(&[]) > 1e-4);
    }
}

/// Tokens of a picture begin as large as words.
#[test]
fn it_begins_at_the_size_of_word_embeddings() {
    let folder = tempfile::tempdir().unwrap();
    let student = |more: &[&str]| -> Result<Student> {
        let config = taught::recipe("smoke.yaml", folder.path(), &[&EYES[..], more].concat())?;
        Student::new(&config, Device::Cpu, Kind::Float, &resolve)
    };
    let student_alone = student(&["model.aux_vision=", "distill={}"]).unwrap();
    let model = &student_alone.model;
    let rms = |x: &tch::Tensor| x.square().mean(Kind::Float).sqrt().double_value(&[]);
    let noise = fixtures::Random::new(3).normal([4, 3, 56, 56]);
    let words = model.llm().embed(&tch::Tensor::arange(512, (Kind::Int64, Device::Cpu)));
    let share = rms(&model.image_features(&noise)) / rms(&words);
    assert!((0.7..1.4).contains(&share), "{share}");
    // Its pictures are in [0, 1], but where a teacher's processor normalises them.
    assert_eq!(student_alone.pictures().processor.mean_std(), ([0.0; 3], [1.0; 3]));
    assert_ne!(student(&[]).unwrap().pictures().processor.mean_std().0, [0.0; 3]);
}
