//! A run as one HTML page that needs nothing else: curves, accuracies, answers, block maps, the run file. What a run does
//! not have, because it is not done or of an older version, the page says.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use image::ImageFormat;
use image::RgbImage;
use minijinja::Environment;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vora_image::BoundingBox;

use crate::block_maps::{self, Layout};
use crate::interval::Interval;
use crate::language::Language;
use crate::metrics::{Line, RewardMetrics, StepMetrics};
use crate::results::TrainResults;
use crate::{plot, samples};

const TEMPLATE: &str = include_str!("report.html");

/// Earlier maps that are shown beside the last.
const EARLIER: usize = 6;

/// What the trained model answered when it was asked: by the picture's file in `samples/`.
pub type Answers = BTreeMap<String, String>;

/// What the template shows.
#[derive(Debug, Serialize)]
struct Page {
    title: String,
    facts: Vec<[String; 2]>,
    charts: Vec<String>, // SVG
    scores: Vec<Split>,
    samples: Vec<Sample>,
    has_answers: bool,
    maps: Option<Maps>,
    earlier_maps: Vec<EarlierMap>,
    config: Option<String>,
    missing: Vec<String>,
}

/// The scores of a split: a row for each question type.
#[derive(Debug, Serialize)]
struct Split {
    name: String,
    columns: Vec<String>,
    rows: Vec<(String, Vec<String>)>,
}

#[derive(Debug, Serialize)]
struct Sample {
    picture: String, // data: URI
    split: String,
    question: String,
    expected: String,
    answer: Option<String>,
    is_right: bool,
    boxes: Vec<Marked>,
}

/// A box over a sample's picture, in thousandths of its sides.
#[derive(Debug, Serialize)]
struct Marked {
    is_expected: bool,
    x: u16,
    y: u16,
    width: u16,
    height: u16,
}

impl Marked {
    /// Those that a text tells.
    fn all_in(text: &str, is_expected: bool) -> impl Iterator<Item = Self> {
        BoundingBox::all_in(text).unwrap_or_default().into_iter().map(move |each| {
            let [x, y, right, bottom] = each.corners();
            Self { is_expected, x, y, width: right - x, height: bottom - y }
        })
    }
}

#[derive(Debug, Serialize)]
struct Maps {
    step: u64,
    pictures: Vec<PictureMaps>,
}

#[derive(Debug, Serialize)]
struct PictureMaps {
    name: String,
    picture: String, // data: URI
    blocks: Vec<BlockMap>,
}

#[derive(Debug, Serialize)]
struct BlockMap {
    cosine: String,
    teacher: String, // data: URI
    student: String, // data: URI
}

#[derive(Debug, Serialize)]
struct EarlierMap {
    step: u64,
    picture: String, // data: URI
}

/// The page of a run folder. `answers` are the trained model's, or why there are none.
///
/// # Errors
/// Where the folder is no run's, or a file in it is broken.
pub fn html(run: &Path, answers: Result<Answers, String>) -> Result<String> {
    let mut missing = Vec::new();
    let lines = metrics(run)?;
    let steps: Vec<&StepMetrics> =
        lines.iter().filter_map(|line| if let Line::Step(step) = line { Some(step) } else { None }).collect();
    if steps.iter().all(|step| step.distill_blocks.is_empty()) {
        missing.push("metrics.jsonl has no cosines by block: no teacher, or a run of an older version".to_owned());
    }
    let results = present(&run.join("train_results.json"), "the run is not done", &mut missing)
        .map(|_| TrainResults::open(run))
        .transpose()?;
    let scores = present(&run.join("eval.json"), "nothing was held out, or the run is not done", &mut missing)
        .map(|path| read_json::<BTreeMap<String, Value>>(&path))
        .transpose()?;
    let config = present(&run.join("config.yaml"), "the run file is not known", &mut missing);
    let run_name = config.as_ref().and_then(|path| name_in(path));
    let config = config.map(std::fs::read_to_string).transpose().context("cannot read config.yaml")?;

    let folder = run.join(samples::FOLDER);
    let no_samples = "nothing was held out, or the run is not done";
    let samples = match present(&folder.join("questions.jsonl"), no_samples, &mut missing) {
        Some(_) => asked(&folder, answers.as_ref().ok())?,
        None => Vec::new(),
    };
    if let (Err(why), false) = (&answers, samples.is_empty()) {
        missing.push(format!("the model was not asked: {why}"));
    }
    let (maps, earlier_maps) = maps(run)?;
    if maps.is_none() {
        missing.push("no block_maps: no teacher, no evaluation yet, or a run of an older version".to_owned());
    }
    let title = run_name.unwrap_or_else(|| name_of(run));
    let page = Page {
        title,
        facts: facts(&steps, results.as_ref(), Language::open(run)?.as_ref()),
        charts: plot::charts(&lines)?,
        scores: scores.unwrap_or_default().into_iter().map(|(name, kinds)| table(name, &kinds)).collect(),
        has_answers: samples.iter().any(|sample| sample.answer.is_some()),
        samples,
        maps,
        earlier_maps,
        config,
        missing,
    };
    let mut environment = Environment::new();
    environment.add_template("report.html", TEMPLATE)?; // the name's ending has all text escaped
    Ok(environment.get_template("report.html")?.render(minijinja::value::Serde(page))?)
}

/// The `run_name` in a run file, where it says one.
fn name_in(config: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Named {
        run_name: Option<String>,
    }
    serde_saphyr::from_str::<Named>(&std::fs::read_to_string(config).ok()?).ok()?.run_name
}

/// The folder's own name.
fn name_of(run: &Path) -> String {
    let whole = run.canonicalize().unwrap_or_else(|_| run.to_owned());
    whole.file_name().unwrap_or(whole.as_os_str()).to_string_lossy().into_owned()
}

/// The lines of `metrics.jsonl`; a last one that the trainer has not written to its end yet is left out.
fn metrics(run: &Path) -> Result<Vec<Line>> {
    let path = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}; vora report takes the folder of a run", path.display()))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let line = |(i, line)| {
        serde_json::from_str(line).with_context(|| format!("{}:{} is not a line of metrics", path.display(), i + 1))
    };
    whole.lines().enumerate().map(line).collect()
}

/// The path where there is such a file, else the reason goes to what is missing.
fn present(path: &Path, why: &str, missing: &mut Vec<String>) -> Option<PathBuf> {
    if path.exists() {
        return Some(path.to_owned());
    }
    missing.push(format!("no {}: {why}", path.file_name().unwrap_or_default().to_string_lossy()));
    None
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not what a run writes there", path.display()))
}

/// What a run came to, in a few numbers.
fn facts(steps: &[&StepMetrics], results: Option<&TrainResults>, language: Option<&Language>) -> Vec<[String; 2]> {
    let mut facts = Vec::new();
    let mut fact = |name: &str, value: String| facts.push([name.to_owned(), value]);
    if let (Some(first), Some(last)) = (steps.first(), steps.last()) {
        fact("steps", last.step.to_string());
        fact("time in steps", time(last.seconds));
        let median = |value: &dyn Fn(&StepMetrics) -> f64| {
            let mut values: Vec<f64> = steps.iter().map(|step| value(step)).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        fact("tokens a second, median", format!("{:.0}", median(&|step| step.tokens_per_second)));
        fact("samples a second, median", format!("{:.1}", median(&|step| step.samples_per_second)));
        let waited = steps.iter().map(|step| step.data_wait).sum::<f64>() / steps.len() as f64;
        let a_step = last.seconds / last.step as f64;
        fact("waiting for data", format!("{:.1}% of the time", 100.0 * waited / a_step));
        fact("language loss, first and last", format!("{:.3}, {:.3}", first.loss_lm, last.loss_lm));
        if let (Some(before), Some(after)) = (first.loss_distill, last.loss_distill) {
            let baseline = last.baseline_distill.map_or(String::new(), |b| format!(" ({b:.3} without looking)"));
            fact("cosine loss, first and last", format!("{before:.3}, {after:.3}{baseline}"));
        }
        if let (Some(before), Some(after)) = (first.rewards, last.rewards) {
            let shown = |rewards: RewardMetrics| {
                format!("{:.3} ({:.0}% of pairs right)", rewards.margins, 100.0 * rewards.accuracies)
            };
            fact("reward margin, first and last", format!("{}, {}", shown(before), shown(after)));
        }
        let anchored: Vec<f64> = steps.iter().filter_map(|step| step.loss_anchor).collect();
        if let (Some(last), most) = (anchored.last(), anchored.iter().copied().fold(0.0, f64::max)) {
            fact("text anchor, most and last", format!("{most:.3}, {last:.3}"));
        }
    }
    if let Some(language) = language {
        fact("what seeing cost in text, adapters on", language.to_string());
    }
    if let Some(results) = results {
        fact("trained parameters", format!("{:.2}M", results.trained_parameters as f64 / 1e6));
        if let Some(bytes) = results.peak_memory {
            fact("peak memory", format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)));
        }
        fact("machine", results.machine.clone().unwrap_or_else(|| "not recorded".to_owned()));
        let version = results.version.as_ref().map(|version| format!("vora {version}"));
        fact("version", version.unwrap_or_else(|| "not recorded".to_owned()));
    }
    facts
}

/// Seconds in words.
fn time(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// The scores of one split, whatever they are called, exact match with its 95% interval; `all` is the last row.
fn table(name: String, kinds: &Value) -> Split {
    let kinds: BTreeMap<&str, Vec<(String, f64)>> = match kinds.as_object() {
        Some(kinds) => kinds.iter().map(|(kind, scores)| (kind.as_str(), numbers("", scores))).collect(),
        None => BTreeMap::new(),
    };
    let mut columns: Vec<String> = Vec::new();
    for (column, _) in kinds.values().flatten() {
        if !columns.contains(column) {
            columns.push(column.clone());
        }
    }
    columns.sort_by_key(|column| (column != "n", column.contains("blind")));
    let row = |(kind, scores): (&&str, &Vec<(String, f64)>)| {
        let score = |column: &String| scores.iter().find(|score| score.0 == *column).map(|score| score.1);
        let interval = |share| Some(Interval::of_share(share, scores.iter().find(|score| score.0 == "n")?.1 as u64));
        let cell = |column| match score(column) {
            None => "–".to_owned(),
            Some(number) if column == "n" => format!("{number:.0}"),
            Some(share) if column == "exact_match" => {
                let interval = interval(share).map_or(String::new(), |interval| format!(" ({interval})"));
                format!("{share:.3}{interval}")
            }
            Some(number) => format!("{number:.3}"),
        };
        ((*kind).to_owned(), columns.iter().map(cell).collect())
    };
    let mut rows: Vec<_> = kinds.iter().map(row).collect();
    rows.sort_by_key(|(kind, _)| kind == "all");
    Split { name, columns: columns.iter().map(|column| column.replace('_', " ")).collect(), rows }
}

/// Every number in a value, by the keys that lead to it.
fn numbers(prefix: &str, value: &Value) -> Vec<(String, f64)> {
    match value {
        Value::Number(number) => number.as_f64().map(|number| (prefix.to_owned(), number)).into_iter().collect(),
        Value::Object(object) => {
            let under = |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix} {key}") };
            object.iter().flat_map(|(key, value)| numbers(&under(key), value)).collect()
        }
        _ => Vec::new(),
    }
}

/// The samples of a run, with what the model answered.
fn asked(folder: &Path, answers: Option<&Answers>) -> Result<Vec<Sample>> {
    let sample = |question: samples::Question| {
        ensure!(
            Path::new(&question.image).components().count() == 1,
            "{} names a picture outside: `{}`",
            folder.display(),
            question.image
        );
        let path = folder.join(&question.image);
        let png = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let answer = answers.and_then(|answers| answers.get(&question.image)).map(|text| text.trim().to_owned());
        let expected = question.answer.trim();
        let told = answer.as_deref().unwrap_or_default();
        Ok(Sample {
            picture: data_uri(&png),
            split: question.split,
            question: question.question,
            is_right: answer.is_some() && (told == expected || BoundingBox::same_in(told, expected)),
            boxes: Marked::all_in(expected, true).chain(Marked::all_in(told, false)).collect(),
            expected: question.answer,
            answer,
        })
    };
    samples::read(folder)?.into_iter().map(sample).collect()
}

/// The last maps, cut into their cells, and earlier ones whole.
fn maps(run: &Path) -> Result<(Option<Maps>, Vec<EarlierMap>)> {
    let mut steps = block_maps::steps(run)?;
    let Some(last) = steps.pop() else { return Ok((None, Vec::new())) };
    let path = run.join(block_maps::FOLDER).join(format!("step-{last}.png"));
    let layout: Layout = read_json(&path.with_extension("json"))?;
    let image = image::open(&path).with_context(|| format!("cannot read {}", path.display()))?.to_rgb8();
    let mut pictures = Vec::new();
    for (row, picture) in layout.pictures.iter().enumerate() {
        let cell = |left, part| {
            let (top, [width, height]) = (layout.row(row, part), layout.cell);
            ensure!(
                left + width <= image.width() && top + height <= image.height(),
                "{} is smaller than its layout",
                path.display()
            );
            png_uri(&image::imageops::crop_imm(&image, left, top, width, height).to_image())
        };
        let block = |(block, cosine): (usize, &f64)| {
            let left = layout.column(block);
            Ok(BlockMap { cosine: format!("{cosine:.2}"), teacher: cell(left, 0)?, student: cell(left, 1)? })
        };
        let blocks = picture.cosines.iter().enumerate().map(block).collect::<Result<_>>()?;
        pictures.push(PictureMaps { name: picture.name.clone(), picture: cell(0, 0)?, blocks });
    }
    let every = steps.len().div_ceil(EARLIER).max(1);
    let mut earlier = Vec::new();
    for step in steps.into_iter().step_by(every) {
        let path = run.join(block_maps::FOLDER).join(format!("step-{step}.png"));
        let png = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        earlier.push(EarlierMap { step, picture: data_uri(&png) });
    }
    Ok((Some(Maps { step: last, pictures }), earlier))
}

fn png_uri(image: &RgbImage) -> Result<String> {
    let mut png = Cursor::new(Vec::new());
    image.write_to(&mut png, ImageFormat::Png).context("encoding a picture")?;
    Ok(data_uri(png.get_ref()))
}

/// A PNG file as a `data:` URI.
fn data_uri(png: &[u8]) -> String {
    format!("data:image/png;base64,{}", BASE64_STANDARD.encode(png))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A run in training: its numbers and nothing else.
    fn begun(run: &Path) {
        let step = |step: u64| {
            json!({
                "step": step, "loss": 2.0, "loss_lm": 1.5, "loss_distill": 0.5, "lr": 1e-3, "grad_norm": 1.0,
                "samples_per_second": 4.0, "tokens_per_second": 160.0, "data_wait": 0.5, "seconds": 2.0 * step as f64,
            })
        };
        let lines: String = (1..=90).map(|i| format!("{}\n", step(i))).collect();
        std::fs::write(run.join("metrics.jsonl"), lines + "{\"step\": 91, \"lo").unwrap();
    }

    #[test]
    fn a_run_in_training_has_a_page_that_says_what_it_lacks() {
        let run = tempfile::tempdir().unwrap();
        let error = html(run.path(), Ok(Answers::new())).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl; vora report takes the folder of a run"), "{error}");
        begun(run.path());
        let page = html(run.path(), Err("it is not done".to_owned())).unwrap();
        for text in ["3 min 0 s", "25.0% of the time", "160", "no train_results.json", "no block_maps", "no cosines by"]
        {
            assert!(page.contains(text), "no `{text}`");
        }
        assert!(!page.contains("<h2>Accuracy") && !page.contains("<h2>Questions"));
    }

    #[test]
    fn everything_stands_in_the_page_and_text_is_text() {
        let run = tempfile::tempdir().unwrap();
        let path = |name: &str| run.path().join(name);
        begun(run.path());
        std::fs::create_dir(path("samples")).unwrap();
        let question = |image: &str, answer: &str| {
            let json = json!({
                "image": image, "question": "<script>alert(1)</script> & \"so\"?", "answer": answer, "kind": "turn",
                "split": "photos",
            });
            RgbImage::from_pixel(2, 2, [9, 9, 9].into()).save(path("samples").join(image)).unwrap();
            format!("{json}\n")
        };
        let questions = question("a.png", "a cat") + &question("b.png", "<b>two</b>");
        std::fs::write(path("samples/questions.jsonl"), questions).unwrap();
        std::fs::write(path("config.yaml"), "run_name: '</pre><script>'").unwrap();
        let scores =
            json!({"photos": {"all": {"n": 12, "exact_match": 0.5, "blind_exact_match": 0.25, "pope": {"f1": 0.125}}}});
        std::fs::write(path("eval.json"), scores.to_string()).unwrap();
        let answers = [("a.png", "a cat"), ("b.png", "<i>one</i>")];
        let answers = answers.map(|(image, text)| (image.to_owned(), text.to_owned())).into();
        let page = html(run.path(), Ok(answers)).unwrap();
        assert!(!page.contains("<script") && !page.contains("<b>two") && !page.contains("<i>one"));
        for text in
            ["&lt;script&gt;alert(1)", "✓ a cat", "✗ &lt;i&gt;one", "expected: &lt;b&gt;two", "data:image/png;base64,"]
        {
            assert!(page.contains(text), "no `{text}`");
        }
        let row = "<th>photos</th><th>n</th><th>exact match</th><th>pope f1</th><th>blind exact match</th>";
        assert!(page.contains(row), "{page}");
        assert!(
            page.contains("<td>all</td><td>12</td><td>0.500 (0.254 to 0.746)</td><td>0.125</td><td>0.250</td>"),
            "{page}"
        );
        // Nothing is fetched from anywhere.
        for text in [" src=\"", " href=\"", "url("] {
            let mut places = page.match_indices(text);
            assert!(places.all(|(at, _)| page[at + text.len()..].starts_with("data:image/png")), "`{text}`");
        }
        // A picture elsewhere is not shown.
        std::fs::write(path("samples/questions.jsonl"), question("c.png", "x").replace("c.png", "../a.png")).unwrap();
        assert!(
            html(run.path(), Err(String::new())).unwrap_err().to_string().contains("a picture outside: `../a.png`")
        );
    }

    #[test]
    fn boxes_lie_over_their_picture() {
        let run = tempfile::tempdir().unwrap();
        begun(run.path());
        let folder = run.path().join("samples");
        std::fs::create_dir(&folder).unwrap();
        let question = |image: &str, answer: &str| {
            RgbImage::from_pixel(6, 2, [9, 9, 9].into()).save(folder.join(image)).unwrap();
            let json =
                json!({"image": image, "question": "Its box?", "answer": answer, "kind": "box", "split": "test"});
            format!("{json}\n")
        };
        let expected = "<box>(100,200),(400,600)</box>";
        std::fs::write(folder.join("questions.jsonl"), question("a.png", expected) + &question("b.png", expected))
            .unwrap();
        let answers = [("a.png", "<box>(100,200),(400,500)</box>"), ("b.png", "<box>(0,0),(1001,9)</box>")];
        let answers = answers.map(|(image, text)| (image.to_owned(), text.to_owned())).into();
        let page = html(run.path(), Ok(answers)).unwrap();
        assert_eq!(page.matches(r#"<rect class="expected" x="100" y="200" width="300" height="400"/>"#).count(), 2);
        assert_eq!(page.matches(r#"<rect class="told" x="100" y="200" width="300" height="300"/>"#).count(), 1);
        assert!(page.contains("✓ &lt;box&gt;(100,200),(400,500)") && page.contains("✗ &lt;box&gt;(0,0),(1001,9)"));
    }

    #[test]
    fn maps_are_cut_where_they_lie() {
        let run = tempfile::tempdir().unwrap();
        begun(run.path());
        assert!(maps(run.path()).unwrap().0.is_none());
        let folder = run.path().join(block_maps::FOLDER);
        std::fs::create_dir(&folder).unwrap();
        for step in [3, 12] {
            let picture = json!({"name": "test-0", "cosines": [0.5]});
            let layout = json!({"cell": [4, 4], "stride": [6, 8], "pictures": [picture]});
            std::fs::write(folder.join(format!("step-{step}.json")), layout.to_string()).unwrap();
            let at = |x, y| [x as u8, y as u8, 0].into();
            RgbImage::from_fn(10, 16, at).save(folder.join(format!("step-{step}.png"))).unwrap();
        }
        let (last, earlier) = maps(run.path()).unwrap();
        let last = last.unwrap();
        assert_eq!((last.step, earlier.len(), earlier[0].step), (12, 1, 3));
        let student = &last.pictures[0].blocks[0].student;
        let png = BASE64_STANDARD.decode(student.strip_prefix("data:image/png;base64,").unwrap()).unwrap();
        let cell = image::load_from_memory(&png).unwrap().to_rgb8();
        assert_eq!((cell.dimensions(), cell.get_pixel(0, 0).0), ((4, 4), [6, 8, 0]));
        let page = html(run.path(), Err(String::new())).unwrap();
        assert!(page.contains("After step 12") && page.contains("after step 3") && page.contains("0.50"));
    }
}
