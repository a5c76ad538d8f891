//! One scene: which objects there are, and their picture.

use image::RgbImage;
use vora_image::BoundingBox;

use super::colour::{self, Colour, Rgb, distance_squared};
use super::dataset::Scenes;
use super::draw::{Draw, Purpose};
use super::ground::Ground;
use super::picture_size::PictureSize;
use super::shape::{EXTENT, Shape};
use super::split::Split;

/// A quarter of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is the quarter of its name")]
pub enum Quarter {
    TopLeft,
    TopRight,
    BottomLeft,
    BottomRight,
}

impl Quarter {
    pub(super) const ALL: [Self; 4] = [Self::TopLeft, Self::TopRight, Self::BottomLeft, Self::BottomRight];

    /// The words for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::TopLeft => "top left",
            Self::TopRight => "top right",
            Self::BottomLeft => "bottom left",
            Self::BottomRight => "bottom right",
        }
    }

    /// Its middle, as shares of the picture's width and height.
    fn middle(self) -> [f32; 2] {
        let x = if matches!(self, Self::TopLeft | Self::BottomLeft) { 0.25 } else { 0.75 };
        let y = if matches!(self, Self::TopLeft | Self::TopRight) { 0.25 } else { 0.75 };
        [x, y]
    }
}

/// A coloured shape in one quarter of the picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// What it is; no other object of its scene is the same.
    pub shape: Shape,
    /// Its colour where that has a name; no other object of its scene has the same.
    pub colour: Option<Colour>,
    /// Where it is; every object has a quarter for itself.
    pub quarter: Quarter,
    rgb: Rgb,
    centre: [f32; 2], // in pixels
    radius: f32,      // in pixels
}

/// Objects on a ground.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// One to three, in no order; in the split `unseen` the first one is a pair that training never showed.
    pub objects: Vec<Object>,
    ground: Rgb,
    size: PictureSize,
}

/// How far a ground keeps from every object's colour, where it can.
const GROUND_DISTANCE: i32 = 75;

impl Scenes {
    /// The scene of this number, always the same.
    pub fn scene(&self, index: u64) -> Scene {
        let draw = &mut Draw::new(self.config.seed, self.split.stream(), index, Purpose::Scene);
        let several = draw.weighted(self.config.objects);
        let alone = self.split == Split::Train && index < self.config.lone_first;
        let num_objects = if alone { 1 } else { 1 + several };
        let unnamed_share = self.config.unnamed_share_of(self.split, index);
        let quarters: [usize; 4] = draw.permutation();
        let size = self.picture_size(index);
        let mut objects: Vec<Object> = Vec::with_capacity(num_objects);
        for quarter in &quarters[..num_objects] {
            let pair = if objects.is_empty() && self.split == Split::Unseen {
                let (colour, shape) = draw.pick(&self.held_out);
                (Some(colour), shape)
            } else {
                self.seen_pair(draw, unnamed_share, &objects)
            };
            let object = self.object(draw, size, Quarter::ALL[*quarter], pair);
            objects.push(object);
        }
        let ground = self.ground(draw, &objects);
        Scene { objects, ground, size }
    }

    fn object(
        &self,
        draw: &mut Draw,
        size: PictureSize,
        quarter: Quarter,
        (colour, shape): (Option<Colour>, Shape),
    ) -> Object {
        let config = &self.config;
        let rgb = match colour {
            Some(colour) => colour.shade(draw, config.colour_jitter),
            None => colour::unnamed(draw, self.colours()),
        };
        let stray = config.position_jitter;
        let [x, y] = quarter.middle();
        let mut at = |middle: f32, side: u32| (middle + 0.5 * draw.between(-stray, stray)) * side as f32;
        let centre = [at(x, size.width), at(y, size.height)];
        let radius = draw.between(config.radius[0], config.radius[1]) * 0.5 * size.short() as f32;
        Object { shape, colour, quarter, rgb, centre, radius }
    }

    /// A pair that training may show, of a colour and a shape that no other object of the scene has.
    fn seen_pair(&self, draw: &mut Draw, unnamed_share: f64, others: &[Object]) -> (Option<Colour>, Shape) {
        let unnamed = draw.chance(unnamed_share);
        // At least four colours and four shapes, at most two taken of each, most pairs allowed: soon found.
        loop {
            let (colour, shape) = (draw.pick(self.colours()), draw.pick(self.shapes()));
            if others.iter().any(|other| other.shape == shape) {
                continue;
            }
            if unnamed {
                return (None, shape);
            }
            if !others.iter().any(|other| other.colour == Some(colour)) && !self.held_out.contains(&(colour, shape)) {
                return (Some(colour), shape);
            }
        }
    }

    /// A ground that every object stands out from: the first of some that does, else the best of them.
    fn ground(&self, draw: &mut Draw, objects: &[Object]) -> Rgb {
        let mut best = (-1, [0; 3]);
        for _ in 0..16 {
            let candidate = match draw.pick(&self.config.grounds) {
                Ground::Grey => [draw.integer(90, 150) as u8; 3],
                Ground::Light => [draw.integer(200, 245) as u8; 3],
                Ground::Dark => [draw.integer(10, 60) as u8; 3],
                Ground::Tinted => {
                    let middle = draw.integer(80, 190);
                    std::array::from_fn(|_| (middle + draw.integer(-40, 40)) as u8)
                }
            };
            let nearest = objects.iter().map(|object| distance_squared(object.rgb, candidate)).min();
            best = best.max((nearest.expect("a scene has an object"), candidate));
            if best.0 >= GROUND_DISTANCE.pow(2) {
                break;
            }
        }
        best.1
    }

    /// The scene's picture: anti-aliased by 4 x 4 inside tests a pixel, with noise.
    pub fn render(&self, index: u64) -> RgbImage {
        let scene = self.scene(index);
        let PictureSize { height, width } = scene.size;
        let mut pixels = vec![scene.ground.map(f32::from); height as usize * width as usize];
        for object in &scene.objects {
            object.paint(&mut pixels, width as usize);
        }
        let mut draw = Draw::new(self.config.seed, self.split.stream(), index, Purpose::Noise);
        let noise = self.config.noise;
        let bytes = pixels.into_iter().flatten().map(|value| (value + noise * normal(&mut draw) + 0.5) as u8).collect();
        RgbImage::from_raw(width, height, bytes).expect("three bytes a pixel")
    }
}

impl Scene {
    /// The box around one of its objects, in its picture.
    pub fn bounding_box(&self, object: &Object) -> BoundingBox {
        let [left, top, right, bottom] = object.shape.bounds();
        let at = |centre: f32, end: f32, side: u32| {
            let thousandths = (centre + end * object.radius) / side as f32 * 1000.0;
            (thousandths.clamp(0.0, 1000.0) + 0.5) as i64
        };
        let ([x, y], PictureSize { height, width }) = (object.centre, self.size);
        let corners = [at(x, left, width), at(y, top, height), at(x, right, width), at(y, bottom, height)];
        BoundingBox::new(corners).expect("an object has its middle in its quarter, and a radius")
    }
}

impl Object {
    /// Lays the object over what is there, rows of `width` pixels, pixel by pixel with the share that it covers.
    fn paint(&self, pixels: &mut [[f32; 3]], width: usize) {
        const STEPS: usize = 4;
        let reach = EXTENT * self.radius;
        let range = |centre: f32, side: usize| {
            let first = (centre - reach).max(0.0) as usize;
            first..((centre + reach) as usize + 1).min(side)
        };
        let [x_centre, y_centre] = self.centre;
        let scale = 1.0 / self.radius;
        let offset = |step: usize| (step as f32 + 0.5) / STEPS as f32;
        for y in range(y_centre, pixels.len() / width) {
            for x in range(x_centre, width) {
                let mut covered = 0;
                for row in 0..STEPS {
                    let v = (y as f32 + offset(row) - y_centre) * scale;
                    for column in 0..STEPS {
                        let u = (x as f32 + offset(column) - x_centre) * scale;
                        covered += usize::from(self.shape.contains(u, v));
                    }
                }
                let share = covered as f32 / (STEPS * STEPS) as f32;
                for (value, colour) in pixels[y * width + x].iter_mut().zip(self.rgb) {
                    *value += (f32::from(colour) - *value) * share;
                }
            }
        }
    }
}

/// Nearly normal, mean 0, deviation 1, without a logarithm: the sum of a word's four bytes.
fn normal(draw: &mut Draw) -> f32 {
    const DEVIATION: f32 = 147.8; // of the sum of four bytes
    let sum: u16 = draw.word().to_le_bytes().into_iter().map(u16::from).sum();
    (f32::from(sum) - 510.0) / DEVIATION
}

#[cfg(test)]
mod tests {
    use super::super::ScenesConfig;
    use super::*;

    fn scenes(split: Split) -> Scenes {
        let grounds = vec![Ground::Grey, Ground::Light, Ground::Dark, Ground::Tinted];
        Scenes::new(
            ScenesConfig {
                grounds,
                colours: Colour::ALL.to_vec(),
                shapes: Shape::ALL.to_vec(),
                held_out: 12,
                objects: [0.6, 0.2, 0.2],
                lone_first: 0,
                ..ScenesConfig::default()
            },
            split,
        )
        .unwrap()
    }

    #[test]
    fn colours_shapes_and_quarters_of_one_scene_differ() {
        let scenes = scenes(Split::Train);
        let mut counts = [0; 4];
        for index in 0..2000 {
            let objects = scenes.scene(index).objects;
            counts[objects.len()] += 1;
            for (i, a) in objects.iter().enumerate() {
                for b in &objects[..i] {
                    assert!(a.shape != b.shape && a.quarter != b.quarter);
                    assert!(a.colour.is_none() || a.colour != b.colour);
                }
            }
        }
        assert!(counts[0] == 0 && counts[1] > 1100 && counts[2] > 320 && counts[3] > 320, "{counts:?}");
    }

    #[test]
    fn held_out_pairs_are_rendered_in_unseen_only_and_always() {
        for split in [Split::Train, Split::Test, Split::Unseen] {
            let scenes = scenes(split);
            for index in 0..1000 {
                for (idx, object) in scenes.scene(index).objects.iter().enumerate() {
                    let held_out = object.colour.is_some_and(|c| scenes.held_out.contains(&(c, object.shape)));
                    assert_eq!(held_out, split == Split::Unseen && idx == 0);
                }
            }
        }
    }

    #[test]
    fn the_first_pictures_of_training_hold_one_object() {
        let config = ScenesConfig { objects: [0.0, 1.0, 1.0], lone_first: 20, ..ScenesConfig::default() };
        let num_objects = |split, index| Scenes::new(config.clone(), split).unwrap().scene(index).objects.len();
        assert_eq!((num_objects(Split::Train, 0), num_objects(Split::Train, 19)), (1, 1));
        assert!(num_objects(Split::Train, 20) > 1 && num_objects(Split::Test, 0) > 1);
    }

    #[test]
    fn colours_without_a_name_may_become_rarer_in_training() {
        let config = ScenesConfig {
            unnamed_share: 1.0,
            unnamed_share_after: Some(0.0),
            shape_of_named_after: 200,
            ..ScenesConfig::default()
        };
        let named = |split, index: u64| {
            let objects = Scenes::new(config.clone(), split).unwrap().scene(index).objects;
            objects.iter().filter(|object| object.colour.is_some()).count() == objects.len()
        };
        assert!((0..200).all(|index| !named(Split::Train, index)));
        assert!((200..400).all(|index| named(Split::Train, index) && !named(Split::Test, index)));
    }

    #[test]
    fn grounds_keep_away_from_objects() {
        let scenes = scenes(Split::Train);
        let close = (0..2000)
            .filter(|index| {
                let scene = scenes.scene(*index);
                scene.objects.iter().any(|o| distance_squared(o.rgb, scene.ground) < GROUND_DISTANCE.pow(2))
            })
            .count();
        assert!(close < 10, "{close} of 2000");
    }

    #[test]
    fn the_object_is_where_the_scene_says() {
        let config = ScenesConfig {
            objects: [1.0, 0.0, 0.0],
            noise: 0.0,
            shapes: Shape::ALL[..4].to_vec(),
            ..ScenesConfig::default()
        };
        let scenes = Scenes::new(config, Split::Train).unwrap();
        for index in 0..50 {
            let (scene, picture) = (scenes.scene(index), scenes.render(index));
            let object = &scene.objects[0];
            if object.shape == Shape::Ring {
                continue; // there is no ring at its centre
            }
            let [x, y] = object.centre.map(|c| c as u32);
            assert_eq!(picture.get_pixel(x, y).0, object.rgb);
            assert_eq!(x < 28, matches!(object.quarter, Quarter::TopLeft | Quarter::BottomLeft));
            assert_eq!(y < 28, matches!(object.quarter, Quarter::TopLeft | Quarter::TopRight));
            assert_eq!(picture.get_pixel(55 - x, 55 - y).0, scene.ground);
        }
    }

    #[test]
    fn a_box_is_what_an_object_covers() {
        let config = ScenesConfig { objects: [1.0, 0.0, 0.0], noise: 0.0, ..ScenesConfig::default() };
        let scenes = Scenes::new(config, Split::Shaped).unwrap();
        for index in 0..100 {
            let (scene, picture) = (scenes.scene(index), scenes.render(index));
            let covered: Vec<(u32, u32)> = picture
                .enumerate_pixels()
                .filter(|(_, _, pixel)| pixel.0 != scene.ground)
                .map(|(x, y, _)| (x, y))
                .collect();
            let ends = |of: &dyn Fn(&(u32, u32)) -> u32, side: u32| {
                let [first, last] = [covered.iter().map(of).min().unwrap(), covered.iter().map(of).max().unwrap() + 1];
                [first, last].map(|end| i64::from(end * 1000 / side))
            };
            let ([x1, x2], [y1, y2]) = (ends(&|at| at.0, picture.width()), ends(&|at| at.1, picture.height()));
            let found = BoundingBox::new([x1, y1, x2, y2]).unwrap();
            let iou = scene.bounding_box(&scene.objects[0]).iou(&found);
            // To the whole pixel, of which a small object has few.
            assert!(iou > if picture.width().min(picture.height()) > 100 { 0.9 } else { 0.6 }, "{index}: {iou}");
        }
    }

    #[test]
    fn pictures_are_the_same_bytes_on_every_machine() {
        // FNV-1a over five pictures of each split; a change of numbers updates it and says why.
        let mut digest = 0xcbf2_9ce4_8422_2325_u64;
        for split in [Split::Train, Split::Test, Split::Unseen] {
            for index in [0, 1, 2, 1 << 20, u64::MAX] {
                for byte in scenes(split).render(index).into_raw() {
                    digest = (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
                }
            }
        }
        assert_eq!(digest, 0x3f4e_4d41_86ae_f74d, "{digest:#x}");
    }
}
