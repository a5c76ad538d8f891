//! A held-out split of descriptions: what the model says is judged, not the one sentence that is written down.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tch::Device;
use vora_data::scenes::{Description, Scenes, ScenesConfig, Split};
use vora_recipe::TrainConfig;
use vora_train::{Options, Outcome, Silent, Trainer};

fn resolve(name: &str) -> Result<PathBuf> {
    Ok(fixtures::root().parent().context("the workspace")?.join(name))
}

/// Teaches four pictures' one sentence, which tells the first one's objects from the bottom up.
#[test]
fn another_order_of_the_same_objects_is_right_and_other_objects_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let two = ScenesConfig {
        objects: [0.0, 1.0, 0.0],
        unnamed_share: 0.0,
        kinds: [(vora_data::scenes::QuestionKind::Describe, 1.0)].into(),
        kinds_of_several: None,
        ..ScenesConfig::default()
    };
    let scenes = Scenes::new(two, Split::Test).unwrap();
    let right = scenes.questions(0).remove(0).answer;
    let objects = right.strip_prefix("The picture shows ").unwrap().strip_suffix('.').unwrap();
    let (first, second) = objects.split_once(" and ").unwrap();
    let said = format!("The picture shows {second} and {first}.");
    assert_eq!(Description::parse(&said), Some(Description::of(&scenes.scene(0))));

    let record = |index: u64| {
        scenes.render(index).save(folder.path().join(format!("{index}.png"))).unwrap();
        let question = format!("<image>\n{}", scenes.questions(index)[0].question);
        let turns = [json!({"from": "human", "value": question}), json!({"from": "gpt", "value": said})];
        json!({"image": format!("{index}.png"), "conversations": turns})
    };
    let records = folder.path().join("records.json");
    std::fs::write(&records, Value::from_iter((0..4).map(record)).to_string()).unwrap();
    let here = folder.path().display();
    let overrides = [
        format!("output_dir={here}/run"),
        format!(
            "data.train.data_fetch={{data_paths: [{{anno_path: '{here}/records.json', image_folder: '{here}', weight: 1}}]}}"
        ),
        "data.train.scenes_weight=1e-9".to_owned(),
        "data.train.scenes.shape_of_named_after=9".to_owned(),
        "data.eval={describe_2: {split: test, samples: 4, questions_per_image: 1, kinds: {describe: 1.0}, \
         objects: [0, 1, 0], unnamed_share: 0}}"
            .to_owned(),
        // All weights are trained, so that the tiny model soon says its one sentence of whatever it sees.
        "model.freeze_llm=false".to_owned(),
        "model.lora=null".to_owned(),
        "bf16=false".to_owned(),
        "learning_rate=1e-2".to_owned(),
        "max_steps=60".to_owned(),
        "evaluation_strategy=no".to_owned(),
        "save_strategy=no".to_owned(),
    ];
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/smoke.yaml");
    let config = TrainConfig::open(&recipe, &overrides).unwrap();
    let mut trainer = Trainer::new(config, Options::new(Device::Cpu, &resolve)).unwrap();
    let Outcome::Finished(report) = trainer.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
    let score = report.0["describe_2"]["describe"];
    assert_eq!((score.n, score.exact_match, score.blind_exact_match), (4, 0.25, Some(0.25)));
}
