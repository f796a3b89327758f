"""Figures on arXiv 2409.17538 and 2601.21719: LoRA's implicit noise, its privacy, its dynamics."""

from lowrank_dp.experiments import (
    dynamics,
    lora_noise,
    matrix_attack,
    noisy_projection,
    projection_privacy,
    total_variation,
    vector_privacy,
)
from lowrank_dp.figures.spec import FigureSpec
from lowrank_dp.plots.dynamics import plot_dynamics
from lowrank_dp.plots.lora_noise import plot_lora_noise, plot_total_variation
from lowrank_dp.plots.noisy_projection import plot_noisy_projection
from lowrank_dp.plots.projection import plot_matrix_attack, plot_projection_privacy
from lowrank_dp.plots.vector_privacy import plot_vector_privacy

FIGURES = {
    "lora_noise": FigureSpec(
        run=lora_noise.run,
        result=lora_noise.Result,
        small=lora_noise.SMALL,
        full=lora_noise.Config(),
        plot=plot_lora_noise,
        headline=lora_noise.headline,
        caption=lora_noise.CAPTION,
        takes_source=True,
    ),
    "total_variation": FigureSpec(
        run=total_variation.run,
        result=total_variation.Result,
        small=total_variation.SMALL,
        full=total_variation.Config(),
        plot=plot_total_variation,
        headline=total_variation.headline,
        caption=total_variation.CAPTION,
        options=(),  # formulas only
    ),
    "projection_privacy": FigureSpec(
        run=projection_privacy.run,
        result=projection_privacy.Result,
        small=projection_privacy.SMALL,
        full=projection_privacy.Config(),
        plot=plot_projection_privacy,
        headline=projection_privacy.headline,
        caption=projection_privacy.CAPTION,
        takes_source=True,
    ),
    "vector_privacy": FigureSpec(
        run=vector_privacy.run,
        result=vector_privacy.Result,
        small=vector_privacy.SMALL,
        full=vector_privacy.Config(),
        plot=plot_vector_privacy,
        headline=vector_privacy.headline,
        caption=vector_privacy.CAPTION,
        table=vector_privacy.table,
        takes_source=True,
        lengthy=True,
    ),
    "matrix_attack": FigureSpec(
        run=matrix_attack.run,
        result=matrix_attack.Result,
        small=matrix_attack.SMALL,
        full=matrix_attack.Config(),
        plot=plot_matrix_attack,
        headline=matrix_attack.headline,
        caption=matrix_attack.CAPTION,
        takes_source=True,
    ),
    "noisy_projection": FigureSpec(
        run=noisy_projection.run,
        result=noisy_projection.Result,
        small=noisy_projection.SMALL,
        full=noisy_projection.Config(),
        plot=plot_noisy_projection,
        headline=noisy_projection.headline,
        caption=noisy_projection.CAPTION,
        table=noisy_projection.table,
        takes_source=True,
        lengthy=True,
    ),
    "dynamics": FigureSpec(
        run=dynamics.run,
        result=dynamics.Result,
        small=dynamics.SMALL,
        full=dynamics.Config(),
        plot=plot_dynamics,
        headline=dynamics.headline,
        caption=dynamics.CAPTION,
        lengthy=True,
    ),
}
