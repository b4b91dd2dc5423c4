//! Scenarios over the running stack. Each file is one part of what a user relies on.

mod agents;
mod command_line;
mod contract;
mod dev;
mod faults;
mod sprites_api;
