//! What a processor makes of a picture.

/// A picture as a model takes it, in plain memory: worker threads make it without touching tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// `[3, height, width]`, row by row.
    pub data: Vec<f32>,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Pixels {
    /// The same picture in other sides, each pixel the one that lies under its middle.
    #[must_use]
    pub fn stretched(&self, height: usize, width: usize) -> Self {
        let under = |place: usize, from: usize, to: usize| (2 * place + 1) * from / (2 * to);
        let mut data = Vec::with_capacity(3 * height * width);
        for plane in self.data.chunks_exact((self.height * self.width).max(1)) {
            for row in 0..height {
                let line = &plane[under(row, self.height, height) * self.width..][..self.width];
                data.extend((0..width).map(|column| line[under(column, self.width, width)]));
            }
        }
        Self { data, height, width }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretched_picture_shows_the_same() {
        let pixels = Pixels { data: (0..18u8).map(f32::from).collect(), height: 2, width: 3 };
        assert_eq!(pixels.stretched(2, 3), pixels);
        let wide = pixels.stretched(1, 6);
        assert_eq!(wide.data[..6], [3.0, 3.0, 4.0, 4.0, 5.0, 5.0]);
        assert_eq!((wide.height, wide.width, wide.data.len()), (1, 6, 18));
    }
}
