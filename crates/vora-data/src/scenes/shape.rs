//! Shapes as inside tests in a frame of their own: centre 0, radius about 1, `v` downwards.

use serde::{Deserialize, Serialize};

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "each is the shape of its name")]
pub enum Shape {
    Circle,
    Square,
    Triangle,
    Cross,
    Ring,
    Star,
    Diamond,
    Heart,
}

/// No shape reaches further than this from its centre, along either axis.
pub(super) const EXTENT: f32 = 1.1;

/// The directions of a five-pointed star's tips, the first upwards.
const TIPS: [[f32; 2]; 5] = [
    [0.0, -1.0],
    [0.951_056_5, -0.309_017],
    [0.587_785_25, 0.809_017],
    [-0.587_785_25, 0.809_017],
    [-0.951_056_5, -0.309_017],
];

impl Shape {
    /// Every shape.
    pub const ALL: [Self; 8] =
        [Self::Circle, Self::Square, Self::Triangle, Self::Cross, Self::Ring, Self::Star, Self::Diamond, Self::Heart];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Circle => "circle",
            Self::Square => "square",
            Self::Triangle => "triangle",
            Self::Cross => "cross",
            Self::Ring => "ring",
            Self::Star => "star",
            Self::Diamond => "diamond",
            Self::Heart => "heart",
        }
    }

    /// Its left, upper, right and lower ends.
    pub(super) fn bounds(self) -> [f32; 4] {
        match self {
            Self::Circle | Self::Cross | Self::Ring => [-1.0, -1.0, 1.0, 1.0],
            Self::Square => [-0.88, -0.88, 0.88, 0.88],
            Self::Triangle => [-1.0, -1.0, 1.0, 0.8],
            Self::Star => [-1.046, -1.1, 1.046, 0.89],
            Self::Diamond => [-0.75, -1.0, 0.75, 1.0],
            Self::Heart => [-0.99, -0.997, 0.99, 1.0],
        }
    }

    /// Whether the shape covers the point.
    pub(super) fn contains(self, u: f32, v: f32) -> bool {
        let (across, along) = (u.abs(), v.abs());
        match self {
            Self::Circle => u * u + v * v <= 1.0,
            Self::Square => across.max(along) <= 0.88,
            Self::Triangle => v <= 0.8 && across <= (v + 1.0) / 1.8,
            Self::Cross => (across <= 1.0 && along <= 0.34) || (along <= 1.0 && across <= 0.34),
            Self::Ring => (0.3..=1.0).contains(&(u * u + v * v)),
            Self::Star => in_star(u, v),
            Self::Diamond => across / 0.75 + along <= 1.0,
            Self::Heart => in_heart(u, v),
        }
    }
}

/// Five tips at 1.1, notches at half of 1: below the edge that falls from the nearest tip to the notch beside it.
fn in_star(u: f32, v: f32) -> bool {
    const SLOPE: f32 = 0.422_6;
    let mut outward = f32::MIN;
    let mut sideways = 0.0;
    for [x, y] in TIPS {
        let reach = u * x + v * y;
        if reach > outward {
            (outward, sideways) = (reach, (u * y - v * x).abs());
        }
    }
    sideways <= (1.1 - outward) * SLOPE
}

/// `(x^2 + y^2 - 1)^3 <= x^2 y^3`, moved and scaled to the frame.
fn in_heart(u: f32, v: f32) -> bool {
    let (x, y) = (1.15 * u, 0.12 - 1.12 * v);
    let rim = x * x + y * y - 1.0;
    rim * rim * rim <= x * x * y * y * y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shape_covers_its_own_points() {
        // centre, right edge, corner, the upper middle, straight below
        let points = [(0.0, 0.0), (0.95, 0.0), (0.8, 0.8), (0.0, -0.97), (0.0, 0.75)];
        let covered = |shape: Shape| points.map(|(u, v)| shape.contains(u, v));
        assert_eq!(covered(Shape::Circle), [true, true, false, true, true]);
        assert_eq!(covered(Shape::Square), [true, false, true, false, true]);
        assert_eq!(covered(Shape::Triangle), [true, false, true, true, true]);
        assert_eq!(covered(Shape::Cross), [true, true, false, true, true]);
        assert_eq!(covered(Shape::Ring), [false, true, false, true, true]);
        assert_eq!(covered(Shape::Star), [true, false, false, true, false]);
        assert_eq!(covered(Shape::Diamond), [true, false, false, true, true]);
        assert_eq!(covered(Shape::Heart), [true, false, false, false, true]);
    }

    #[test]
    fn bounds_are_where_a_shape_ends() {
        const STEPS: i32 = 300;
        for shape in Shape::ALL {
            let mut found = [f32::MAX, f32::MAX, f32::MIN, f32::MIN];
            let place = |step: i32| 1.2 * step as f32 / STEPS as f32;
            for (row, column) in (-STEPS..=STEPS).flat_map(|row| (-STEPS..=STEPS).map(move |column| (row, column))) {
                let (u, v) = (place(column), place(row));
                if shape.contains(u, v) {
                    found = [found[0].min(u), found[1].min(v), found[2].max(u), found[3].max(v)];
                }
            }
            let apart = found.iter().zip(shape.bounds()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 0.03, "{shape:?}: {found:?}");
        }
    }

    #[test]
    fn no_shape_leaves_its_extent_and_none_is_a_dot() {
        for shape in Shape::ALL {
            let mut covered = 0;
            for y in -150..=150 {
                for x in -150..=150 {
                    let (u, v) = (x as f32 / 100.0, y as f32 / 100.0);
                    if shape.contains(u, v) {
                        covered += 1;
                        assert!(u.abs() <= EXTENT && v.abs() <= EXTENT, "{shape:?} reaches ({u}, {v})");
                    }
                }
            }
            assert!(covered > 10_000, "{shape:?} covers {} of the unit square", f64::from(covered) / 1e4);
        }
    }
}
