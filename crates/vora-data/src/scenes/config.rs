//! What a dataset of scenes is made of.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::colour::Colour;
use super::ground::Ground;
use super::question_kind::QuestionKind;
use super::shape::Shape;
use super::split::Split;

/// The `scenes:` section of a run file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScenesConfig {
    /// Another seed gives other pictures, in every split.
    pub seed: u64,
    /// Side of the square picture, in pixels.
    pub image_size: u32,
    /// Narrowest and widest pictures, width over height. With this key or `sides` the size of each picture is drawn; the one
    /// that is absent is then `[1/3, 3]`, or `[28, 448]`. Without both, pictures are squares of `image_size`, but for those
    /// of the split `shaped`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aspects: Option<[f32; 2]>,
    /// Shortest and longest sides of pictures whose size is drawn, in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sides: Option<[u32; 2]>,
    /// The named colours; at least 4.
    pub colours: Vec<Colour>,
    /// The shapes; at least 4.
    pub shapes: Vec<Shape>,
    /// Shares of pictures with one, two and three objects; they need not add up to 1.
    pub objects: [f64; 3],
    /// The first so many pictures of the split `train` hold one object: what is easy comes first.
    pub lone_first: u64,
    /// Colour-shape pairs that the splits `train` and `test` never show nor name. Each colour and each shape keeps
    /// more than half of its partners.
    pub held_out: usize,
    /// Share of objects with a colour that has no name; no question asks for it.
    pub unnamed_share: f64,
    /// Pictures of the split `train` before this number ask the shape of no object whose colour has a name: while shapes
    /// are still guessed, a colour would otherwise come to stand for the shapes it is shown with, and against the one
    /// that is held out from it.
    pub shape_of_named_after: u64,
    /// `unnamed_share` of the pictures of the split `train` from `shape_of_named_after` on; absent: the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unnamed_share_after: Option<f64>,
    /// Questions asked about one picture; fewer where it gives rise to fewer.
    pub questions_per_image: usize,
    /// How often each question type is asked, relative to the others; one that is missing is not asked.
    pub kinds: BTreeMap<QuestionKind, f64>,
    /// The same for pictures of several objects; none where it is the same.
    pub kinds_of_several: Option<BTreeMap<QuestionKind, f64>>,
    /// Share of questions about a lone object that name it all the same: "What color is the circle?".
    pub named_share: f64,
    /// The grounds, each as often as the others.
    pub grounds: Vec<Ground>,
    /// An object's radius, smallest and largest, as a share of its quarter's side.
    pub radius: [f32; 2],
    /// How far an object strays from the middle of its quarter, as a share of the quarter's side.
    pub position_jitter: f32,
    /// How far each channel of a named colour strays, of 255.
    pub colour_jitter: u8,
    /// Standard deviation of the noise on every channel of every pixel, of 255.
    pub noise: f32,
}

impl Default for ScenesConfig {
    fn default() -> Self {
        use QuestionKind::{Colour as AskColour, HowMany, Shape as AskShape, Where, YesNo};
        Self {
            seed: 0,
            image_size: 56,
            aspects: None,
            sides: None,
            colours: vec![Colour::Red, Colour::Green, Colour::Blue, Colour::Yellow, Colour::White, Colour::Black],
            shapes: vec![Shape::Square, Shape::Ring, Shape::Cross, Shape::Triangle],
            objects: [0.7, 0.15, 0.15],
            lone_first: 360,
            held_out: 4,
            unnamed_share: 0.2,
            shape_of_named_after: 0,
            unnamed_share_after: None,
            questions_per_image: 4,
            kinds: BTreeMap::from([(AskColour, 1.0), (AskShape, 1.5), (Where, 1.0), (HowMany, 0.3), (YesNo, 2.5)]),
            kinds_of_several: Some(BTreeMap::from([(HowMany, 4.0), (YesNo, 2.5)])),
            named_share: 0.0,
            grounds: vec![Ground::Grey],
            radius: [0.378, 0.462],
            position_jitter: 0.036,
            colour_jitter: 15,
            noise: 4.0,
        }
    }
}

impl ScenesConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Names the first key whose value makes no dataset, and what it takes.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            (8..=4096).contains(&self.image_size),
            "scenes.image_size is {}, it must be 8 to 4096",
            self.image_size
        );
        if let Some([narrowest, widest]) = self.aspects {
            ensure!(
                0.1 <= narrowest && narrowest <= widest && widest <= 10.0,
                "scenes.aspects is [{narrowest}, {widest}], it must be two numbers from 0.1 to 10, the smaller one first"
            );
        }
        if let Some([shortest, longest]) = self.sides {
            ensure!(
                8 <= shortest && shortest <= longest && longest <= 4096,
                "scenes.sides is [{shortest}, {longest}], it must be two numbers from 8 to 4096, the smaller one first"
            );
        }
        check_list("colours", &self.colours)?;
        check_list("shapes", &self.shapes)?;
        let total: f64 = self.objects.iter().sum();
        ensure!(
            self.objects.iter().all(|share| *share >= 0.0) && total > 0.0 && total.is_finite(),
            "scenes.objects is {:?}, it must hold three shares of which one is above 0",
            self.objects
        );
        let most = self.most_held_out();
        ensure!(
            self.held_out <= most,
            "scenes.held_out is {}, it must be at most {most} so that each of {} colours and {} shapes keeps more \
             than half of its partners",
            self.held_out,
            self.colours.len(),
            self.shapes.len()
        );
        let after = self.unnamed_share_after.map(|share| ("unnamed_share_after", share));
        let shares = [("unnamed_share", self.unnamed_share), ("named_share", self.named_share)];
        for (key, share) in shares.into_iter().chain(after) {
            ensure!((0.0..=1.0).contains(&share), "scenes.{key} is {share}, it must be 0 to 1");
        }
        ensure!(self.questions_per_image > 0, "scenes.questions_per_image is 0, it must be at least 1");
        check_kinds("kinds", &self.kinds)?;
        if let Some(kinds) = &self.kinds_of_several {
            check_kinds("kinds_of_several", kinds)?;
        }
        ensure!(!self.grounds.is_empty(), "scenes.grounds is empty, it must name at least one ground");
        let [smallest, largest] = self.radius;
        ensure!(
            0.1 <= smallest && smallest <= largest && largest <= 0.6,
            "scenes.radius is {:?}, it must be two numbers from 0.1 to 0.6, the smaller one first",
            self.radius
        );
        ensure!(
            (0.0..=0.2).contains(&self.position_jitter),
            "scenes.position_jitter is {}, it must be 0 to 0.2",
            self.position_jitter
        );
        ensure!(self.colour_jitter <= 30, "scenes.colour_jitter is {}, it must be 0 to 30", self.colour_jitter);
        ensure!((0.0..=64.0).contains(&self.noise), "scenes.noise is {}, it must be 0 to 64", self.noise);
        Ok(())
    }

    /// The pairs held out, dealt diagonally, so that all colours and all shapes lose equally many, give or take one.
    pub(super) fn held_out_pairs(&self) -> Vec<(Colour, Shape)> {
        let (colours, shapes) = (&self.colours, &self.shapes);
        (0..self.held_out)
            .map(|k| {
                let (colour, round) = (k % colours.len(), k / colours.len());
                (colours[colour], shapes[(colour + round) % shapes.len()])
            })
            .collect()
    }

    /// How often a question type is asked about a picture of this many objects.
    pub(super) fn weight(&self, kind: QuestionKind, num_objects: usize) -> f64 {
        let several = self.kinds_of_several.as_ref().filter(|_| num_objects > 1);
        several.unwrap_or(&self.kinds).get(&kind).copied().unwrap_or(0.0)
    }

    /// Share of objects with a colour that has no name in the picture of this number.
    pub(super) fn unnamed_share_of(&self, split: Split, index: u64) -> f64 {
        let after = self.unnamed_share_after.filter(|_| split == Split::Train && index >= self.shape_of_named_after);
        after.unwrap_or(self.unnamed_share)
    }

    /// Whether the split `train` has pictures about which nothing can be asked yet: before `shape_of_named_after` a
    /// description would tell the shape of an object whose colour has a name.
    pub(super) fn describes_too_early(&self) -> bool {
        let only_describes = |kinds: &BTreeMap<QuestionKind, f64>| {
            let mut asked = kinds.iter().filter(|(_, weight)| **weight > 0.0);
            asked.all(|(kind, _)| *kind == QuestionKind::Describe)
        };
        let mut kinds = std::iter::once(&self.kinds).chain(&self.kinds_of_several);
        self.shape_of_named_after > 0 && kinds.any(only_describes)
    }

    fn most_held_out(&self) -> usize {
        let (colours, shapes) = (&self.colours, &self.shapes);
        (0..=colours.len() * shapes.len())
            .take_while(|&n| {
                let pairs = Self { held_out: n, ..self.clone() }.held_out_pairs();
                let lost_by_colour = |c| pairs.iter().filter(|pair| pair.0 == c).count();
                let lost_by_shape = |s| pairs.iter().filter(|pair| pair.1 == s).count();
                colours.iter().all(|c| 2 * lost_by_colour(*c) < shapes.len())
                    && shapes.iter().all(|s| 2 * lost_by_shape(*s) < colours.len())
            })
            .last()
            .unwrap_or(0)
    }
}

/// Three objects of one picture all differ, and one more is needed to be absent.
fn check_list<T: PartialEq + std::fmt::Debug>(key: &str, list: &[T]) -> Result<()> {
    ensure!(list.len() >= 4, "scenes.{key} has {} entries, it must have at least 4", list.len());
    for (idx, item) in list.iter().enumerate() {
        ensure!(!list[..idx].contains(item), "scenes.{key} has {item:?} twice");
    }
    Ok(())
}

fn check_kinds(key: &str, kinds: &BTreeMap<QuestionKind, f64>) -> Result<()> {
    for (kind, weight) in kinds {
        ensure!(*weight >= 0.0 && weight.is_finite(), "scenes.{key}.{kind} is {weight}, it must be 0 or more");
    }
    // An object of an unnamed colour is not asked its colour, nor among several its shape: other question types must be there.
    use QuestionKind::{Box, Caption, Describe, HowMany, Where, YesNo};
    ensure!(
        [Where, HowMany, YesNo, Caption, Describe, Box]
            .iter()
            .any(|kind| kinds.get(kind).is_some_and(|weight| *weight > 0.0)),
        "scenes.{key} asks nothing that every picture can answer, it needs one of where, how_many, yes_no, caption, \
         describe, box"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn held_out_pairs_are_different_and_leave_most_partners() {
        for (num_colours, num_shapes) in [(8, 5), (8, 8), (12, 8), (4, 4), (6, 4)] {
            let (colours, shapes) = (Colour::ALL[..num_colours].to_vec(), Shape::ALL[..num_shapes].to_vec());
            let mut config = ScenesConfig { colours, shapes, held_out: 0, ..ScenesConfig::default() };
            config.held_out = config.most_held_out();
            config.validate().unwrap();
            let pairs = config.held_out_pairs();
            assert_eq!(pairs.iter().collect::<HashSet<_>>().len(), pairs.len());
            assert!(config.held_out >= num_colours, "{num_colours} x {num_shapes} allows only {}", config.held_out);
        }
    }

    #[test]
    fn errors_name_the_key_and_what_it_takes() {
        let default = ScenesConfig::default;
        let says = |config: ScenesConfig, text: &str| {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(text), "`{message}` lacks `{text}`");
        };
        default().validate().unwrap();
        says(ScenesConfig { colours: vec![Colour::Red; 3], ..default() }, "scenes.colours has 3 entries");
        says(ScenesConfig { shapes: vec![Shape::Ring; 4], ..default() }, "scenes.shapes has Ring twice");
        says(ScenesConfig { held_out: 40, ..default() }, "scenes.held_out is 40, it must be at most");
        says(ScenesConfig { objects: [0.0; 3], ..default() }, "scenes.objects");
        says(ScenesConfig { noise: f32::NAN, ..default() }, "scenes.noise is NaN");
        says(ScenesConfig { unnamed_share_after: Some(1.5), ..default() }, "scenes.unnamed_share_after is 1.5");
        says(ScenesConfig { kinds: BTreeMap::from([(QuestionKind::Colour, 1.0)]), ..default() }, "scenes.kinds");
        says(ScenesConfig { radius: [0.5, 0.4], ..default() }, "the smaller one first");
        says(ScenesConfig { aspects: Some([0.0, 1.0]), ..default() }, "scenes.aspects is [0, 1]");
        says(ScenesConfig { sides: Some([60, 30]), ..default() }, "scenes.sides is [60, 30]");
    }

    #[test]
    fn unknown_keys_are_refused() {
        let read = serde_json::from_str::<ScenesConfig>;
        assert_eq!(read(r#"{"colours": ["pink"], "kinds": {"how_many": 2.0}}"#).unwrap().colours, [Colour::Pink]);
        assert!(read(r#"{"colors": 6}"#).unwrap_err().to_string().contains("unknown field `colors`"));
        assert!(read(r#"{"kinds": {"size": 1.0}}"#).unwrap_err().to_string().contains("unknown variant `size`"));
    }
}
