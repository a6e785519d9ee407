//! Evidence: what is stored beside an image, fetched and hashed here, judged in `verify`.

pub mod cosign;
pub mod registry;
