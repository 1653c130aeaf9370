"""The perfect score network of a distribution that is known: what distribution matching is checked against."""

from greedy_distill_jax.diffusion import flow


def gaussian(mean, std):
    """``velocity(x, sigma, batch)`` of videos drawn from N(mean, std^2), elementwise: from E[x0 | x_sigma]."""

    def velocity(x, sigma, batch):
        s = flow.expand(sigma, x)
        gain = (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2)
        x0 = mean + gain * (x - (1 - s) * mean)
        return flow.velocity_from_x0(x, x0, sigma)

    return velocity
