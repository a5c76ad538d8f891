//! Writes scenes as conversations with PNG files, to read them with anything that reads this format:
//! `export_scenes FOLDER COUNT`. `fixtures/tiny/data` is made so, with a count of 4.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;
use vora_data::scenes::{Scenes, ScenesConfig, Split};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: export_scenes FOLDER COUNT";
    let folder = PathBuf::from(arguments.next().context(usage)?);
    let count: u64 = arguments.next().context(usage)?.parse().context(usage)?;
    let config = ScenesConfig { noise: 0.0, lone_first: 0, ..ScenesConfig::default() }; // without noise PNG is small
    let scenes = Scenes::new(config, Split::Train)?;

    fs::create_dir_all(folder.join("images"))?;
    let mut records = BufWriter::new(File::create(folder.join("conversations.jsonl"))?);
    for index in 0..count {
        let frame = format!("{index}.png");
        scenes.render(index).save(folder.join("images").join(&frame))?;
        let mut turns = Vec::new();
        for (turn, asked) in scenes.questions(index).iter().enumerate() {
            let place = if turn == 0 { "<image>\n" } else { "" };
            turns.push(json!({"from": "human", "value": format!("{place}{}", asked.question)}));
            turns.push(json!({"from": "gpt", "value": asked.answer}));
        }
        let record = json!({"id": format!("train-{index}"), "frames": [frame], "conversations": turns});
        writeln!(records, "{record}")?;
    }
    Ok(records.flush()?)
}
