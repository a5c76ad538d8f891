//! Image to pixels to patches; vision transformers as teacher and encoder.
